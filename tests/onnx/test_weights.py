"""Weights alone are codes: how the file stores them, and that ONNX Runtime multiplies by those codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_onnx._agreement import step_by_step
from qpipe_onnx._runtime import OnnxRuntimeModule
from qpipe_onnx._tables import decoded
from torch import Tensor, nn

from qpipe import Artifact, Granularity, ProofError, Recipe, Role, Task, convert
from qpipe.recipe import LayerRule, SlotEdit

Exported = tuple[nn.Module, Artifact, Path]
T = onnx.TensorProto
ASYMMETRIC = {"symmetric": False, "signed": False, "restricted": False}
LAYERS: dict[str, tuple[Granularity, dict[str, Any], int]] = {  # how it is rounded, and the type of its codes
    "tokens": (PerSubchannel(32), {"num_bits": 4}, T.INT4),
    "places": (PerChannel(), {}, T.UINT8),
    "blocks64": (PerSubchannel(64), {"num_bits": 4}, T.INT4),
    "blocks48": (PerSubchannel(48), {"num_bits": 3}, T.INT4),
    "blocks8": (PerSubchannel(8), {"num_bits": 4}, T.INT4),
    "padded": (PerSubchannel(64, pad=True), {"num_bits": 4}, T.INT4),
    "asymmetric": (PerSubchannel(32), {"num_bits": 4, **ASYMMETRIC}, T.UINT4),
    "byte_blocks": (PerSubchannel(32), {}, T.INT8),
    "bytes": (PerChannel(), {"symmetric": False, "restricted": False}, T.INT8),
    "tensor": (PerLayer(), {}, T.INT8),
    "conv": (PerChannel(), {"num_bits": 4}, T.INT4),
    "head": (PerChannel(), {"num_bits": 4}, T.INT4),
}


class Layers(nn.Module):
    """A layer for each way of storing a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 192), nn.Embedding(20, 192)
        self.blocks64, self.blocks48 = nn.Linear(192, 96), nn.Linear(96, 96)
        self.blocks8, self.padded = nn.Linear(96, 100), nn.Linear(100, 64, bias=False)
        self.asymmetric, self.byte_blocks = nn.Linear(64, 64), nn.Linear(64, 64)
        self.bytes, self.tensor = nn.Linear(64, 64), nn.Linear(64, 64)
        self.conv, self.head = nn.Conv1d(64, 32, 3, padding=1), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(x % 20)
        x = torch.relu(self.blocks48(torch.relu(self.blocks64(x))))
        x = self.asymmetric(self.padded(torch.relu(self.blocks8(x))))
        x = self.tensor(torch.relu(self.bytes(self.byte_blocks(x))))
        logits: Tensor = self.head(self.conv(x.transpose(1, 2)).mean(-1))
        return logits


_EXPORTED: list[Exported] = []


@pytest.fixture
def exported(
    export: Callable[..., tuple[nn.Module, Artifact]], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> Exported:
    """Export once for all tests."""
    if not _EXPORTED:
        torch.manual_seed(0)
        rules = tuple(
            LayerRule(name, {Role.WEIGHT: SlotEdit(granularity=granularity, spec=spec)})
            for name, (granularity, spec, _) in LAYERS.items()
        )
        recipe = make_recipe(activation=None, layers=rules)
        simulation, artifact = export(Layers(), [torch.randint(50, (3, 7))], recipe)
        _EXPORTED.append((simulation, artifact, tmp_path / artifact.path))
    return _EXPORTED[0]


def test_products_and_rows_are_computed_on_codes(exported: Exported) -> None:
    nodes = exported[1].proof["nodes"]
    assert nodes["MatMulNBits"] == 8
    assert nodes["GatherBlockQuantized"] == 2
    assert nodes["DequantizeLinear"] == 2  # blocks of 8, and the convolution's
    assert not nodes.keys() & {"Gemm", "Gather"}


def test_the_proof_holds_sizes_and_times(exported: Exported) -> None:
    proof, size = exported[1].proof, exported[1].num_bytes
    words = ("", "fp32_", "default_precision_")
    assert all(proof[f"{word}latency_ms{batch}"] > 0 for word in words for batch in ("", "_b32"))
    assert proof["latency_ms_b32"] > proof["latency_ms"]
    assert proof["counted_bytes"] < size < 1.5 * proof["counted_bytes"]


def test_every_layer_gives_what_the_simulation_gives(exported: Exported) -> None:
    proof = exported[1].proof
    assert proof["layers"] == len(LAYERS)
    assert proof["largest_layer_difference"] < 1e-5
    assert proof["max_difference_steps"] < 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_codes_have_the_narrowest_type(exported: Exported, name: str) -> None:
    tensors = onnx.load(exported[2]).graph.initializer
    codes = [t for t in tensors if t.name.startswith(f"{name}.weight_quantizer.codes") and len(t.dims) > 1]
    codes = [t for t in codes if "scale" not in t.name and "zero_point" not in t.name]
    assert [tensor.data_type for tensor in codes] == [LAYERS[name][2]]


def test_no_weight_is_left_in_floating_point(exported: Exported) -> None:
    model = onnx.load(exported[2])
    floats = [t for t in model.graph.initializer if t.data_type == T.FLOAT and "scale" not in t.name]
    assert {len(tensor.dims) for tensor in floats} <= {0, 1}  # biases, and scales of blocks


def test_codes_an_engine_multiplies_by_are_no_table(exported: Exported) -> None:
    """Else products of dynamic codes would be compared before their scale: they were, 129 steps away."""
    assert not decoded(onnx_ir.load(exported[2]).graph)


def test_a_layer_that_is_computed_otherwise_is_named(exported: Exported) -> None:
    simulation, _, path = exported
    converted = convert(simulation)
    converted.get_submodule("asymmetric.weight_quantizer").codes[3, 5] ^= 7
    with pytest.raises(ProofError, match=r"layer 'asymmetric' 0\.\d+ of its largest output"):
        step_by_step(converted, path, ((torch.randint(50, (4, 7)),), {}), Task())


def test_the_file_says_how_precisely_it_is_to_be_computed(exported: Exported) -> None:
    """Unasked, ONNX Runtime rounds the activations of such products to int8."""
    _, artifact, path = exported
    assert artifact.module is not None
    x = torch.randint(50, (4, 7))
    exact, unasked = (
        OnnxRuntimeModule.open(path)(x),
        OnnxRuntimeModule(path, (), _first(), accuracy_level=4)(x),
    )
    assert torch.equal(exact, artifact.module(x))
    assert 1e-4 < (unasked - exact).abs().max() / exact.abs().max() < 0.1


def _first() -> Any:  # noqa: ANN401
    from qpipe.calls import indexed

    return indexed(torch.zeros(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(60, 96), nn.Linear(96, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(x))
        return logits


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("granularity", [PerChannel(), PerSubchannel(32)])
def test_a_table_that_is_the_head_too_is_stored_once(
    granularity: Granularity,
    num_bits: int,
    export: Callable[..., tuple[nn.Module, Artifact]],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    recipe = make_recipe(activation=None)
    assert recipe.weight is not None
    weight = replace(
        recipe.weight, granularity=granularity, spec=replace(recipe.weight.spec, num_bits=num_bits)
    )
    _, artifact = export(Tied(), [torch.randint(60, (3, 7))], replace(recipe, weight=weight))
    assert artifact.proof["nodes"] == {"GatherBlockQuantized": 1, "MatMulNBits": 1}
    assert artifact.proof["layers"] == 2
    assert artifact.proof["largest_layer_difference"] < 1e-5
    stored = onnx.load(tmp_path / artifact.path).graph.initializer
    assert [[*t.dims] for t in stored if t.data_type != T.FLOAT and len(t.dims) > 1][:1] == [[60, 96]]
    assert sum(len(t.raw_data) for t in stored) < 60 * 96 * num_bits // 8 + 60 * 4 * 5

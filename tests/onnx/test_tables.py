"""Levels that are not even, in ONNX: packed to their bits, decoded as the file is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_methods.quantizer.binary_code import BinaryCodeQuantizer
from qpipe_methods.quantizer.codebook import CodebookQuantizer
from qpipe_methods.quantizer.float import FloatQuantizer
from qpipe_methods.quantizer.log import LogQuantizer
from qpipe_methods.quantizer.nf4 import NF4Quantizer
from qpipe_methods.quantizer.vector import VectorQuantizer
from qpipe_onnx._agreement import step_by_step
from qpipe_onnx._runtime import OnnxRuntimeModule
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import Tensor, nn

from qpipe import Artifact, Granularity, ProofError, Quantizer, Recipe, Role, Task, convert, pack
from qpipe.recipe import LayerRule, SlotEdit

Exported = tuple[nn.Module, Artifact, Path]
LAYERS: dict[str, tuple[Quantizer[Any], Granularity, int]] = {
    "tokens": (LogQuantizer(), PerChannel(), 5),
    "nf4": (NF4Quantizer(), PerSubchannel(64), 4),
    "mx": (FloatQuantizer(2, 3, block_scale="e8m0"), PerSubchannel(32), 6),
    "codebook": (CodebookQuantizer(), PerChannel(), 3),
    "signs": (BinaryCodeQuantizer(), PerSubchannel(64), 2),
    "conv": (FloatQuantizer(4, 3), PerSubchannel(64, pad=True), 8),
    "vector": (VectorQuantizer(dim=4, starts=1), PerLayer(), 7),
}


class Layers(nn.Module):
    """A layer for each way of decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.nf4, self.mx = nn.Embedding(50, 128), nn.Linear(128, 256), nn.Linear(256, 256)
        self.codebook, self.signs = nn.Linear(256, 256, bias=False), nn.Linear(256, 128)
        self.conv, self.vector = nn.Conv1d(128, 64, 3, padding=1), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mx(torch.relu(self.nf4(self.tokens(x)))))
        x = self.signs(torch.relu(self.codebook(x)))
        logits: Tensor = self.vector(self.conv(x.transpose(1, 2)).mean(-1))
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
            LayerRule(
                name, {Role.WEIGHT: SlotEdit(quantizer, granularity=granularity, spec={"num_bits": bits})}
            )
            for name, (quantizer, granularity, bits) in LAYERS.items()
        )
        recipe = make_recipe(activation=None, layers=rules)
        simulation, artifact = export(Layers(), [torch.randint(50, (3, 7))], recipe)
        _EXPORTED.append((simulation, artifact, tmp_path / artifact.path))
    return _EXPORTED[0]


def test_every_layer_gives_what_the_simulation_gives(exported: Exported) -> None:
    proof = exported[1].proof
    assert proof["layers"] == len(LAYERS)
    assert proof["largest_layer_difference"] < 1e-5
    assert proof["max_difference_steps"] < 0.01


def test_the_label_says_that_only_the_file_is_small(exported: Exported) -> None:
    assert exported[1].proof["precision"] == "weights stored in 2, 3, 4, 5, 6, 7, 8 bits, computed in float32"
    assert not exported[1].proof["nodes"].keys() & {"MatMulNBits", "BitShift", "DequantizeLinear"}


@pytest.mark.parametrize("name", LAYERS)
def test_codes_take_their_bits(exported: Exported, name: str) -> None:
    simulation, _, path = exported
    [stored] = [t for t in onnx.load(path).graph.initializer if t.name == f"{name}.weight_quantizer.codes"]
    fake_quant = simulation.get_submodule(f"{name}.weight_quantizer")
    slot = fake_quant.slot
    codes = fake_quant.codes(simulation.get_submodule(name)._parameters["weight"].detach())
    expected = pack(codes - slot.quantizer.code_min(slot.spec), slot.spec.num_bits)
    assert bytes(expected.numpy()) == onnx.numpy_helper.to_array(stored).tobytes()[: len(expected)]


def test_the_file_has_the_size_that_is_counted(exported: Exported) -> None:
    """What lies above are the operations that decode, under 3 kB a layer."""
    artifact = exported[1]
    assert artifact.num_bytes < artifact.proof["counted_bytes"] + 3000 * len(LAYERS)


def test_decoding_needs_no_operation_of_our_own(exported: Exported) -> None:
    model = onnx.load(exported[2])
    onnx.checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} == {""}


def test_a_file_nobody_optimizes_gives_the_same(exported: Exported) -> None:
    """The decoding is executed, not folded; the bits are found by ONNX Runtime's own operations."""
    _, artifact, path = exported
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = torch.randint(50, (4, 7))
    [plain] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert artifact.module is not None
    assert np.allclose(plain, artifact.module(x).numpy(), atol=1e-5)
    assert torch.equal(OnnxRuntimeModule.open(path)(x), artifact.module(x))


def test_a_layer_that_is_decoded_otherwise_is_named(exported: Exported) -> None:
    simulation, _, path = exported
    converted = convert(simulation, tables=True)
    converted.get_submodule("codebook.weight_quantizer").codes[3, 1] ^= 7
    with pytest.raises(ProofError, match=r"layer 'codebook' 0\.\d+ of its largest output"):
        step_by_step(converted, path, ((torch.randint(50, (4, 7)),), {}), Task())


def test_quantized_activations_beside_tables_are_refused_before_any_work(
    make_recipe: Callable[..., Recipe],
) -> None:
    """ONNX Runtime would make int8 of the weights, as it loads the file, and say nothing."""
    recipe = make_recipe()
    assert recipe.weight is not None
    recipe = replace(recipe, weight=replace(recipe.weight, quantizer=CodebookQuantizer()))
    reason = OnnxExporter().reason_not(recipe)
    assert reason is not None
    assert "use activation=null to quantize weights alone" in reason

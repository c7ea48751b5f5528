from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_onnx._agreement import step_by_step
from qpipe_onnx._trace import trace
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import Tensor, nn

from qpipe import Artifact, DataError, ExportContext, ProofError, Recipe, RecipeError, Task, convert
from qpipe.calls import given
from qpipe.nn import ChannelClip, edge_quantizers
from qpipe.stages.prepare import prepare

Exported = tuple[nn.Module, Artifact, Path]
Export = Callable[..., tuple[nn.Module, Artifact]]


class Residual(nn.Module):
    """One of everything an integer engine has to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.relu = nn.ReLU()
        self.relu6 = nn.ReLU6()
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(self.pad(x)))
        y = self.project(self.relu6(self.depthwise(self.relu6(self.expand(x)))))
        x = self.pool(self.relu(x + y)).mean((2, 3))
        logits: Tensor = self.fc2(self.relu(self.fc1(x)))
        return logits


class Named(nn.Module):
    """Named inputs, tokens of any length, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        hidden = torch.relu(self.linear(self.embedding(tokens)))
        if scale is not None:
            hidden = hidden * scale[:, None, None]
        return {"logits": self.head(hidden.mean(1)), "hidden": (hidden,)}


def residual() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Residual(), [torch.randn(16, 3, 16, 16), torch.randn(7, 3, 16, 16)]


_EXPORTED: list[Exported] = []


@pytest.fixture
def exported(export: Export, tmp_path: Path) -> Exported:
    """Export the residual network once for all tests."""
    if not _EXPORTED:
        simulation, artifact = export(*residual())
        _EXPORTED.append((simulation, artifact, tmp_path / artifact.path))
    return _EXPORTED[0]


def test_every_operation_is_executed_on_codes(exported: Exported) -> None:
    _, artifact, _ = exported
    nodes = artifact.proof["nodes"]
    assert nodes["QLinearConv"] == 4
    assert nodes["QLinearAdd"] == 1
    assert nodes["QLinearGlobalAveragePool"] == 1
    assert nodes["QGemm"] == 2
    assert not nodes.keys() & {"Conv", "Add", "Gemm", "MatMul", "Relu", "Clip", "Pad", "DequantizeLinear"}


def test_the_file_agrees_with_the_simulation(exported: Exported) -> None:
    simulation, artifact, _ = exported
    _, batches = residual()
    assert artifact.module is not None
    assert artifact.proof["largest_edge_difference_steps"] <= 1
    assert artifact.proof["samples"] == 23
    with torch.no_grad():
        executed, simulated = artifact.module(batches[1]), simulation(batches[1])
    power = (executed - simulated).square().mean()
    assert artifact.proof["agreement_percent"] == 100
    assert 10 * torch.log10(simulated.square().mean() / power) > 35


def test_asymmetric_weights_of_four_bits_run_on_codes_too(
    export: Export, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe()
    assert recipe.weight is not None
    spec = replace(recipe.weight.spec, num_bits=4, symmetric=False, signed=False, restricted=False)
    recipe = replace(recipe, weight=replace(recipe.weight, spec=spec))
    _, artifact = export(*residual(), recipe)
    assert artifact.proof["nodes"]["QLinearConv"] == 4
    assert artifact.proof["nodes"]["QGemm"] == 2
    assert artifact.proof["largest_edge_difference_steps"] <= 1


def test_any_batch_size_gives_the_same_rows(exported: Exported) -> None:
    _, artifact, _ = exported
    _, (batch, _) = residual()
    assert artifact.module is not None
    whole = artifact.module(batch)
    for size in (1, 5):
        assert torch.equal(artifact.module(batch[:size]), whole[:size])


def test_a_single_sample_is_enough_for_a_dynamic_batch(export: Export) -> None:
    model, (batch, _) = residual()
    _, artifact = export(model, [batch[:1]])
    assert artifact.module is not None
    assert artifact.module(batch).shape == (16, 5)


def test_weights_are_stored_as_integers_only(exported: Exported) -> None:
    _, _, path = exported
    tensors = onnx.load(path).graph.initializer
    floats = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) <= 16  # scales, one a channel
    assert {tensor.data_type for tensor in tensors if len(tensor.dims) > 1 and np.prod(tensor.dims) > 16} == {
        onnx.TensorProto.INT8
    }
    onnx.checker.check_model(path, full_check=True)


def test_the_file_says_nothing_of_this_machine(exported: Exported) -> None:
    content = exported[2].read_bytes()
    assert b".py" not in content
    assert b"torch" not in content


def test_inputs_have_names_and_outputs_keep_their_structure(export: Export) -> None:
    torch.manual_seed(0)
    batch = {"tokens": torch.randint(20, (6, 9)), "scale": torch.rand(6)}
    simulation, artifact = export(Named(), [batch])
    assert artifact.module is not None
    other = {"scale": torch.rand(2), "tokens": torch.randint(20, (2, 4))}
    with torch.no_grad():
        executed, simulated = artifact.module(**other), simulation(**other)
    assert [*executed] == ["logits", "hidden"]
    assert executed["hidden"][0].shape == (2, 4, 8)
    assert torch.allclose(executed["logits"], simulated["logits"], atol=0.05)


def test_a_file_opens_by_itself(export: Export, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"tokens": torch.randint(20, (6, 9))}
    _, artifact = export(Named(), [batch])
    opened = OnnxExporter.load(tmp_path / artifact.path)
    assert opened is not None
    assert artifact.module is not None
    assert torch.equal(opened(**batch)["logits"], artifact.module(**batch)["logits"])


def test_four_bit_weights_execute_in_eight_bit_containers(
    export: Export, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe()
    assert recipe.weight is not None
    four = replace(recipe.weight, spec=replace(recipe.weight.spec, num_bits=4))
    _, artifact = export(*residual(), replace(recipe, weight=four))
    assert artifact.proof["nodes"]["QLinearConv"] == 4
    codes = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / artifact.path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert max(int(np.abs(array).max()) for array in codes) == 7


def test_weights_alone_may_be_quantized(export: Export, make_recipe: Callable[..., Recipe]) -> None:
    _, artifact = export(*residual(), make_recipe(activation=None))
    assert artifact.proof["edges"] == 0
    assert artifact.proof["max_difference_steps"] < 0.01


def test_a_dead_channel_keeps_its_bias(export: Export) -> None:
    model, batches = residual()
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.project.weight[2] = 0
        model.project.bias[2] = 3.0  # type: ignore[index]
        model.depthwise.weight[0] = 1e-20
    _, artifact = export(model, batches)
    assert artifact.proof["largest_edge_difference_steps"] <= 1
    assert artifact.proof["nodes"]["QLinearConv"] == 4


def test_a_clip_that_saturation_does_not_imply_is_taken_of_codes(
    make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None], tmp_path: Path
) -> None:
    model, batches = residual()
    recipe = make_recipe()
    prepare(model.eval(), batches, Task(), recipe)
    calibrate_on(model, 20 * batches[0])
    edge = next(edge for edge in edge_quantizers(model) if edge.name.startswith("relu6"))
    edge.scale = torch.full_like(edge.scale, 10 / 255)
    loud = [20 * batch for batch in batches]
    artifact = OnnxExporter().export(ExportContext(model, model, loud, Task(), recipe, tmp_path))
    nodes = artifact.proof["nodes"]
    assert (nodes["QLinearConv"], nodes["Min"], nodes.get("Max", 0)) == (4, 1, 0)
    assert artifact.proof["largest_edge_difference_steps"] <= 1


def test_bounds_of_their_own_for_each_channel_are_taken_of_codes(export: Export) -> None:
    """Equalized layers have them; of floats they would leave every convolution in floating point."""
    model, batches = residual()
    assert isinstance(model, Residual)
    low, high = (torch.linspace(*ends, 16).reshape(-1, 1, 1) for ends in ((-0.3, 0.1), (0.2, 0.9)))
    model.add_module("relu6", ChannelClip(low, high))
    _, artifact = export(model, batches)
    nodes = artifact.proof["nodes"]
    assert (nodes["QLinearConv"], nodes["Min"], nodes["Max"]) == (4, 2, 2)
    assert not nodes.keys() & {"Conv", "DequantizeLinear"}
    assert artifact.proof["largest_edge_difference_steps"] <= 1
    assert artifact.proof["equal_codes_percent"] > 99.9


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, r = torch.linalg.qr(x)
        return q + r


def test_an_operation_without_an_onnx_form_is_named() -> None:
    """Not torch's report of the step at which it stopped."""
    with pytest.raises(RecipeError, match=r"no ONNX form.*: \w+: .*linalg_qr.*leave out exporter onnx"):
        trace(_Unknown(), ((torch.randn(2, 3, 3),), {}), 21)


def test_an_edge_that_is_computed_otherwise_is_named(exported: Exported) -> None:
    simulation, _, path = exported
    converted = convert(simulation)
    converted.get_submodule("project.weight_quantizer").codes.neg_()
    with pytest.raises(ProofError, match=r"edge 'project' \d+ steps away"):
        step_by_step(converted, path, ((torch.randn(4, 3, 16, 16),), {}), Task())


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        tmp_path / "a.onnx",
    )
    with pytest.raises(DataError, match="does not say how it is called"):
        OnnxExporter.load(tmp_path / "a.onnx")


def _truncated(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString()[:-500]


def _elsewhere(model: onnx.ModelProto) -> bytes:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return model.SerializeToString()


def _hidden(model: onnx.ModelProto) -> bytes:
    """Name the other file in a graph within a graph."""
    inner = onnx.helper.make_graph([], "inner", [], [], [onnx.TensorProto(name="w", data_location=1)])
    entry = inner.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    return model.SerializeToString()


def _misshapen(model: onnx.ModelProto) -> bytes:
    codes = next(
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    )
    codes.dims[0], codes.dims[1] = codes.dims[1], codes.dims[0]
    return model.SerializeToString()


def _senseless(model: onnx.ModelProto) -> bytes:
    model.metadata_props[0].value = "[1, 2"
    return model.SerializeToString()


def _short(model: onnx.ModelProto) -> bytes:
    model.metadata_props[0].value = '{"keywords": [], "output": 7}'
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_truncated, "is no complete ONNX file"),
        (_elsewhere, "from another file \\('../../etc/passwd'\\)"),
        (_hidden, "from another file \\('../../etc/passwd'\\)"),
        (_misshapen, "ONNX Runtime does not take"),
        (_senseless, "does not say sensibly"),
        (_short, "returns fewer tensors"),
    ],
)
def test_a_harmed_file_is_refused(
    exported: Exported, tmp_path: Path, harm: Callable[[onnx.ModelProto], bytes], reason: str
) -> None:
    path = tmp_path / "harmed.onnx"
    path.write_bytes(harm(onnx.load(exported[2])))
    with pytest.raises(DataError, match=reason):
        OnnxExporter.load(path)


def test_a_size_without_a_name_may_be_any() -> None:
    x = torch.zeros(2, 3)
    assert given(((x,), {}), (), {"x": [None, 3]}) == [x]
    with pytest.raises(DataError, match=r"takes 'x' of shape \[None, 4\], not \[2, 3\]"):
        given(((x,), {}), (), {"x": [None, 4]})


def test_a_call_that_does_not_fit_is_refused(exported: Exported) -> None:
    module = exported[1].module
    assert module is not None
    with pytest.raises(DataError, match=r"takes 'x' of shape \[batch, 3, 16, 16\], not \[2, 3, 8, 8\]"):
        module(torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError, match="takes 1 tensors, not 0"):
        module()


@pytest.mark.parametrize(
    ("role", "changes", "reason"),
    [
        ("activation", {"dynamic": True}, "dynamic=true"),
        ("activation", {"num_bits": 4}, "activation.num_bits=4"),
        ("weight", {"num_bits": 12}, "weight.num_bits=12"),
        ("weight", {"symmetric": False, "restricted": False}, "one zero point"),
    ],
)
def test_what_cannot_be_expressed_is_said_in_a_sentence(
    role: str, changes: dict[str, Any], reason: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe()
    slot = getattr(recipe, role)
    changed = replace(slot, spec=replace(slot.spec, **changes))
    assert OnnxExporter().reason_not(recipe) is None
    assert reason in str(OnnxExporter().reason_not(replace(recipe, **{role: changed})))


def test_several_scales_a_channel_cannot_be_expressed(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert recipe.weight is not None
    fine = replace(recipe.weight, granularity=PerSubchannel(group_size=64))
    assert "more scales" in str(OnnxExporter().reason_not(replace(recipe, weight=fine)))

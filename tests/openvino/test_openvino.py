from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.granularity.subchannel import PerSubchannel
from torch import Tensor, nn

from qpipe import Artifact, DataError, ExportContext, ProofError, Recipe, Task, convert
from qpipe.nn import ChannelClip

pytest.importorskip("openvino", reason="openvino is not installed; pip install 'qpipe-quant[openvino]'")

from qpipe_openvino._agreement import step_by_step
from qpipe_openvino._graph import translate
from qpipe_openvino._runtime import OpenVinoModule
from qpipe_openvino.exporter.openvino import OpenVinoExporter

MakeContext = Callable[..., ExportContext]
Exported = tuple[ExportContext, Artifact, Path]


class Residual(nn.Module):
    """One of everything an integer engine has to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(self.pad(x)))
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        logits: Tensor = self.fc(self.pool(torch.relu(x + self.project(y))).mean((2, 3)))
        return logits


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"hidden": hidden + self.second(nn.functional.gelu(self.first(hidden)))}


_EXPORTED: list[Exported] = []


@pytest.fixture
def exported(make_context: MakeContext, tmp_path: Path) -> Exported:
    """Export the residual network once for all tests."""
    if not _EXPORTED:
        torch.manual_seed(0)
        context = make_context(Residual(), [torch.randn(16, 3, 16, 16), torch.randn(7, 3, 16, 16)])
        artifact = OpenVinoExporter().export(context)
        _EXPORTED.append((context, artifact, tmp_path / artifact.path))
    return _EXPORTED[0]


def test_every_operation_is_executed_on_codes(exported: Exported) -> None:
    nodes = exported[1].proof["nodes"]
    assert nodes["Convolution u8"] == 4
    assert nodes["FullyConnected u8"] == 1
    floats = ("Convolution f", "Eltwise f", "MatMul f", "FullyConnected f")
    assert not [name for name in nodes if name.startswith(floats)]


def test_the_model_agrees_with_the_simulation(exported: Exported) -> None:
    context, artifact, _ = exported
    assert artifact.module is not None
    assert artifact.proof["edges"] == 7
    assert artifact.proof["largest_edge_difference_steps"] <= 1
    assert artifact.proof["samples"] == 23
    assert artifact.proof["sqnr_db"] > 35
    words = ("", "fp32_", "default_precision_")
    assert {f"{word}latency_ms{size}" for word in words for size in ("", "_b32")} <= artifact.proof.keys()
    (batch, _) = context.batches  # type: ignore[misc]
    whole = artifact.module(batch)
    assert torch.equal(artifact.module(batch[:3]), whole[:3])


def test_a_clip_a_channel_is_part_of_the_convolution(make_context: MakeContext) -> None:
    """Equalization leaves such behind of ReLU6; as Maximum and Minimum they were computed in float32."""
    torch.manual_seed(0)
    high = torch.linspace(0.1, 2, 8).view(8, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), ChannelClip(torch.zeros(8, 1, 1), high), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    call = ((torch.randn(5, 3, 6, 6),), {})
    context = make_context(model, [call[0][0]])
    assert torch.allclose(OpenVinoModule(translate(model, call))(*call[0]), model(*call[0]), atol=1e-5)
    proof = OpenVinoExporter(compare_fp32=False).export(context).proof
    assert proof["nodes"]["Convolution u8"] == 2
    assert not [name for name in proof["nodes"] if name.startswith("Eltwise")]


def test_an_edge_that_is_computed_otherwise_is_named(exported: Exported) -> None:
    converted, call = convert(exported[0].simulation), ((torch.randn(4, 3, 16, 16),), {})
    graph = translate(converted, call)
    converted.get_submodule("project.weight_quantizer").codes.neg_()
    with pytest.raises(ProofError, match=r"OpenVINO computes edge 'project' \d+ steps away"):
        step_by_step(converted, graph, call, Task())


@pytest.mark.parametrize(("num_bits", "kind"), [(4, "i4"), (8, "i8")])
@pytest.mark.parametrize("group_size", [None, 16])
def test_weights_alone_are_kept_in_their_bits(
    num_bits: int,
    kind: str,
    group_size: int | None,
    make_context: MakeContext,
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe("generic", activation=None)
    assert recipe.weight is not None
    spec = replace(recipe.weight.spec, num_bits=num_bits)
    granularity = recipe.weight.granularity if group_size is None else PerSubchannel(group_size=group_size)
    torch.manual_seed(0)
    context = make_context(
        Mlp(),
        [{"hidden": torch.randn(3, 5, 64)}],
        replace(recipe, weight=replace(recipe.weight, spec=spec, granularity=granularity)),
    )
    artifact = OpenVinoExporter(compare_fp32=False).export(context)
    assert artifact.proof["nodes"][f"FullyConnected {kind}"] == 2
    codes = 2 * 64 * 32 * num_bits // 8
    scales = 4 * (96 if group_size is None else 2 * 64 * 32 // group_size)
    size = (context.folder / "model.bin").stat().st_size
    assert codes + scales <= size < codes + scales + 800  # and biases
    loaded = OpenVinoExporter.load(context.folder / artifact.path)
    assert loaded is not None
    hidden = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = context.simulation(hidden=hidden)["hidden"]
    assert torch.allclose(loaded(hidden=hidden)["hidden"], expected, atol=1e-5)


Files = dict[str, bytes]


def _short(files: Files) -> None:
    files["model.bin"] = files["model.bin"][:-20]


def _cut(files: Files) -> None:
    files["model.xml"] = files["model.xml"][: len(files["model.xml"]) // 2]


def _unknown(files: Files) -> None:
    files["model.xml"] = files["model.xml"].replace(b'type="Convolution"', b'type="System"')


def _misshapen(files: Files) -> None:
    files["model.xml"] = files["model.xml"].replace(b'shape="16, 8, 1, 1"', b'shape="8, 16, 1, 1"')


def _another_format(files: Files) -> None:
    """An ONNX file, whatever its name, is read by OpenVINO; it could name other files."""
    onnx = pytest.importorskip("onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = onnx.helper.make_opsetid("", 21)
    files["model.xml"] = onnx.helper.make_model(graph, opset_imports=[opset]).SerializeToString()


def _edited(files: Files, **changes: Any) -> None:  # noqa: ANN401
    files["openvino.json"] = json.dumps(json.loads(files["openvino.json"]) | changes).encode()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_short, "OpenVINO does not take .*model.xml: Incorrect weights in bin file"),
        (_cut, "OpenVINO does not take .*model.xml: .* at offset"),
        (_unknown, "OpenVINO does not take .*model.xml: .*type: System"),
        (_misshapen, "OpenVINO does not take .*model.xml: .*shape"),
        (_another_format, "model.xml is no OpenVINO model"),
        (lambda files: _edited(files, output=5), "returns more tensors than model.xml has"),
        (lambda files: _edited(files, sha256={"model.xml": "0"}), "describes no OpenVINO model of qpipe"),
        (lambda files: _edited(files, format="other"), "is not the file openvino.json was written for"),
        (lambda files: files.update({"openvino.json": b"\xff{"}), "describes no OpenVINO model of qpipe"),
        (lambda files: files.update({"openvino.json": b"[" * 9999}), "describes no OpenVINO model of qpipe"),
    ],
)
def test_harmed_files_are_refused(
    harm: Callable[[Files], None], reason: str, exported: Exported, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in exported[2].parent.iterdir() if file.is_file()}
    before = dict(files)
    harm(files)
    if files["openvino.json"] == before["openvino.json"]:  # a manifest made to fit what was harmed
        digests = {name: hashlib.sha256(files[name]).hexdigest() for name in ("model.xml", "model.bin")}
        _edited(files, sha256=digests)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        OpenVinoExporter.load(tmp_path / "openvino.json")


def test_changed_files_are_refused(exported: Exported, tmp_path: Path) -> None:
    for file in exported[2].parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.bin").write_bytes(b"\1" + (tmp_path / "model.bin").read_bytes()[1:])
    with pytest.raises(DataError, match=r"model.bin is not the file openvino.json was written for"):
        OpenVinoExporter.load(tmp_path / "openvino.json")
    (tmp_path / "model.bin").unlink()
    with pytest.raises(DataError, match=r"model.bin is not the file openvino.json was written for"):
        OpenVinoExporter.load(tmp_path / "openvino.json")


def test_a_call_that_does_not_fit_is_refused(exported: Exported) -> None:
    module = exported[1].module
    assert module is not None
    with pytest.raises(DataError, match=r"takes 'x' of shape \[\?, 3, 16, 16\], not \[2, 3, 8, 8\]"):
        module(torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError, match="takes 1 tensors, not 0"):
        module()


@pytest.mark.parametrize(
    ("role", "changes", "reason"),
    [
        ("activation", {"dynamic": True}, "dynamic=true"),
        ("activation", {"num_bits": 4}, "activation.num_bits=4"),
        ("weight", {"num_bits": 12}, "weight.num_bits=12"),
    ],
)
def test_what_cannot_be_expressed_is_said_in_a_sentence(
    role: str, changes: dict[str, Any], reason: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe()
    slot = getattr(recipe, role)
    changed = replace(slot, spec=replace(slot.spec, **changes))
    assert OpenVinoExporter().reason_not(recipe) is None
    assert reason in str(OpenVinoExporter().reason_not(replace(recipe, **{role: changed})))


def signal_stack() -> bytes:
    """Return this thread's alternate signal stack: a pointer, flags, a size."""
    found = ctypes.create_string_buffer(24)
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(None, found)
    return found.raw


BEFORE = signal_stack()  # when tests are collected, before any runs


@pytest.mark.usefixtures("exported")
def test_no_signal_stack_is_left_behind() -> None:
    """On the one that OpenVINO sets for AMX a handler ran over the end: Ctrl-C was a segmentation fault."""
    assert signal_stack() == BEFORE

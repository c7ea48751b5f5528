from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.exporter.torch import TorchExporter
from qpipe_methods.granularity.subchannel import PerSubchannel
from torch import Tensor, nn

from qpipe import DataError, ExportContext, Recipe, convert

MakeContext = Callable[..., ExportContext]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        logits: Tensor = self.fc(torch.relu(x + self.conv(x)).mean((2, 3)))
        return logits


@pytest.fixture
def context(make_context: MakeContext) -> ExportContext:
    torch.manual_seed(0)
    return make_context(Residual(), [torch.randn(8, 3, 8, 8), torch.randn(3, 3, 8, 8)])


_ARCHIVE: dict[str, bytes] = {}


@pytest.fixture
def archive(context: ExportContext) -> dict[str, bytes]:
    """Return the records of a program, exported once for all tests."""
    if not _ARCHIVE:
        artifact = TorchExporter().export(context)
        with zipfile.ZipFile(context.folder / artifact.path) as file:
            _ARCHIVE.update({name: file.read(name) for name in file.namelist()})
    return _ARCHIVE


def test_a_loaded_program_is_the_converted_model_for_any_batch(context: ExportContext) -> None:
    artifact = TorchExporter().export(context)
    loaded = TorchExporter.load(context.folder / artifact.path)
    assert loaded is not None
    converted = convert(context.simulation)
    with torch.no_grad():
        for size in (1, 5):
            batch = torch.randn(size, 3, 8, 8)
            assert torch.equal(loaded(batch), converted(batch))
    assert artifact.proof["bit_equal"]
    assert artifact.proof["samples"] == 11
    assert artifact.proof["sqnr_db"] > 40


def test_the_program_holds_codes_and_no_float_weights(context: ExportContext) -> None:
    artifact = TorchExporter().export(context)
    assert artifact.module is not None
    tensors = dict(artifact.module.named_parameters()) | dict(artifact.module.named_buffers())
    assert {x.dtype for x in tensors.values() if x.dim() > 1} == {torch.int8}


def test_blocks_of_four_bits_keep_their_function(
    make_context: MakeContext, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("generic", activation=None)
    assert recipe.weight is not None
    spec = replace(recipe.weight.spec, num_bits=4)
    recipe = replace(
        recipe, weight=replace(recipe.weight, spec=spec, granularity=PerSubchannel(group_size=16))
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    artifact = TorchExporter().export(make_context(model, [torch.randn(4, 32)], recipe))
    assert artifact.proof["max_difference_steps"] < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_makes_int8_kernels(context: ExportContext) -> None:
    proof = TorchExporter(compile=True).export(context).proof
    assert proof["kernels"].get("qconv2d_pointwise", 0) + proof["kernels"].get("qconv_pointwise", 0) >= 2
    assert proof["compiled_sqnr_db"] > 30


class Trap:
    """Leave a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


Records = dict[str, bytes]
PROGRAM = "model/models/model.json"
WEIGHTS = "model/data/weights/model_weights_config.json"
INPUTS = "model/data/sample_inputs/model.pt"


def _pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Trap(marker), buffer)
    return buffer.getvalue()


def _touch(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def _edited(records: Records, edit: Callable[[Any], object], name: str = PROGRAM) -> None:
    about = json.loads(records[name])
    edit(about)
    records[name] = json.dumps(about).encode()


def _pickled_inputs(records: Records, marker: Path) -> None:
    records[INPUTS] = _pickled(marker)


def _pickled_weight(records: Records, marker: Path) -> None:
    records["model/data/weights/weight_0"] = _pickled(marker)
    _edited(records, lambda about: next(iter(about["config"].values())).update(use_pickle=True), WEIGHTS)


def _older_weights(records: Records, marker: Path) -> None:
    records["model/data/weights/model.pt"] = _pickled(marker)


def _library(records: Records, marker: Path) -> None:
    records["model/data/aotinductor/model/model.so"] = b"ELF"


def _guard(records: Records, marker: Path) -> None:
    _edited(records, lambda about: about["guards_code"].append(_touch(marker)))


def _size(records: Records, marker: Path) -> None:
    records[PROGRAM] = records[PROGRAM].replace(
        json.dumps("Symbol('s77', positive=True, integer=True)").encode(), json.dumps(_touch(marker)).encode()
    )


def _endless(records: Records, marker: Path) -> None:
    power = "Pow(Integer(9), Pow(Integer(9), Pow(Integer(9), Integer(9))))"
    records[PROGRAM] = records[PROGRAM].replace(b"Symbol('s77', positive=True, integer=True)", power.encode())


def _argument(records: Records, marker: Path) -> None:
    records[PROGRAM] = records[PROGRAM].replace(b'"x"', json.dumps(f"x=({_touch(marker)})").encode())


def _targeted(records: Records, target: str) -> None:
    _edited(records, lambda about: about["graph_module"]["graph"]["nodes"][0].update(target=target))


def _operation(records: Records, marker: Path) -> None:
    _targeted(records, "torch.hub.load_state_dict_from_url")


def _reads_a_file(records: Records, marker: Path) -> None:
    _targeted(records, "torch.ops.aten.from_file.default")


def _returning(records: Records, container: str, context: dict[str, Any]) -> None:
    spec = {"type": container, "context": json.dumps(context), "children_spec": []}
    changes = {"out_spec": json.dumps([1, spec])}
    _edited(records, lambda about: about["graph_module"]["module_call_graph"][0]["signature"].update(changes))


def _enumeration(records: Records, marker: Path) -> None:
    _returning(records, "builtins.dict", {"__enum__": True, "fqn": "os:name", "name": "x"})


def _factory(records: Records, marker: Path) -> None:
    _returning(records, "collections.defaultdict", {})


def _other_shape(records: Records, marker: Path) -> None:
    records["model/data/weights/weight_0"] = b"\0" * 4


def _no_json(records: Records, marker: Path) -> None:
    records[PROGRAM] = b"[" * 10


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_pickled_inputs, "holds example inputs, which are pickled, which this exporter never writes"),
        (_pickled_weight, "as a pickle"),
        (_older_weights, "holds 'data/weights/model.pt'"),
        (_library, "holds 'data/aotinductor/model/model.so'"),
        (_guard, "holds the expression"),
        (_size, "holds the expression"),
        (_endless, "holds the expression"),
        (_argument, "holds the name"),
        (_operation, "holds the operation 'torch.hub.load_state_dict_from_url'"),
        (_reads_a_file, "holds the operation 'torch.ops.aten.from_file.default'"),
        (_enumeration, "holds the name '__enum__'"),
        (_factory, "holds a collections.defaultdict"),
        (_other_shape, "no program torch can load"),
        (_no_json, "no program torch can load"),
    ],
)
def test_an_edited_program_runs_nothing(
    harm: Callable[[Records, Path], None], reason: str, archive: Records, tmp_path: Path
) -> None:
    records, path = dict(archive), tmp_path / "edited.pt2"
    harm(records, tmp_path / "marker")
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    with pytest.raises(DataError, match=reason):
        TorchExporter.load(path)
    assert not (tmp_path / "marker").exists()


def test_a_damaged_program_is_refused(context: ExportContext, tmp_path: Path) -> None:
    artifact = TorchExporter().export(context)
    path = tmp_path / "short.pt2"
    path.write_bytes((context.folder / artifact.path).read_bytes()[:-500])
    with pytest.raises(DataError, match=r"short.pt2 is no program torch can load"):
        TorchExporter.load(path)


def test_what_cannot_be_expressed_is_said_in_a_sentence(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert recipe.activation is not None
    dynamic = replace(recipe.activation, spec=replace(recipe.activation.spec, dynamic=True))
    assert TorchExporter().reason_not(recipe) is None
    assert "dynamic=true" in str(TorchExporter().reason_not(replace(recipe, activation=dynamic)))

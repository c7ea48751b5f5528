from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qpipe_methods.exporter.safetensors import SafetensorsExporter
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_methods.transform.fold_bn import FoldBatchNorm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpipe import Artifact, DataError, ExportContext, Recipe, Task, load, payload_bytes
from qpipe.artifact import sha256
from qpipe.nn import weight_quantizers
from qpipe.stages.prepare import prepare


class Net(nn.Module):
    """Folded norms, a residual sum, tied weights, a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 8, 1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = (x + self.project(x)).mean((2, 3))
        logits: Tensor = self.second(self.norm(torch.relu(self.first(x))))
        return logits


Written = tuple[Net, nn.Module, Artifact, Path]
Write = Callable[..., Written]
BATCH = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def write(make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None], tmp_path: Path) -> Write:
    def run(num_bits: int = 8, subchannel: bool = False) -> Written:
        torch.manual_seed(0)
        reference, recipe = Net().eval(), make_recipe()
        reference.bn.running_mean = torch.randn(8)
        assert recipe.weight is not None
        spec = replace(recipe.weight.spec, num_bits=num_bits)
        granularity = PerSubchannel(group_size=3, pad=True) if subchannel else recipe.weight.granularity
        recipe = replace(recipe, weight=replace(recipe.weight, spec=spec, granularity=granularity))
        simulation = copy.deepcopy(reference)
        FoldBatchNorm().apply(simulation, [BATCH], Task(), recipe)
        prepare(simulation, [BATCH], Task(), recipe)
        calibrate_on(simulation, BATCH)
        context = ExportContext(simulation, reference, [BATCH], Task(), recipe, tmp_path)
        return reference, simulation, SafetensorsExporter().export(context), tmp_path

    return run


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8, 12])
def test_the_loaded_model_is_bit_equal_to_the_simulation(write: Write, num_bits: int) -> None:
    _, simulation, artifact, folder = write(num_bits)
    with torch.no_grad():
        assert torch.equal(load(folder, model=Net)(BATCH), simulation(BATCH))
    assert artifact.engine == "simulated"
    assert artifact.sha256 == sha256(folder / "manifest.json")


def test_padded_blocks_are_restored_too(write: Write) -> None:
    _, simulation, _, folder = write(4, subchannel=True)
    with torch.no_grad():
        assert torch.equal(load(folder, model=Net())(BATCH), simulation(BATCH))


@pytest.mark.parametrize("num_bits", [3, 8])
def test_the_file_holds_the_bytes_that_are_counted(write: Write, num_bits: int) -> None:
    _, simulation, _, folder = write(num_bits)
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == payload_bytes(simulation)
    codes = sum(n * num_bits // 8 for n in (8 * 27, 8 * 8, 8 * 8))  # conv, project, the tied pair once
    scales = 4 * (8 + 8 + 8)
    norms_and_biases = 4 * (8 + 8 + 8 + 16)
    edges = {key: t for key, t in tensors.items() if "activation_quantizers" in key}
    assert payload_bytes(simulation) == codes + scales + norms_and_biases + sum(
        t.nbytes for t in edges.values()
    )


def test_a_loaded_model_can_be_stored_again(write: Write, tmp_path: Path) -> None:
    reference, simulation, _, folder = write()
    again = load(folder, model=copy.deepcopy(reference))
    assert payload_bytes(again) == payload_bytes(simulation)
    assert all(weight.fake_quant.enabled for weight in weight_quantizers(again))


def test_a_float_model_is_all_rest() -> None:
    model = Net()
    tied = model.second.weight.nbytes
    assert payload_bytes(model) == sum(t.nbytes for t in model.state_dict().values()) - tied


def edited(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_truncated_file_is_refused(write: Write) -> None:
    *_, folder = write()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="is not the file its manifest was written for"):
        load(folder, model=Net)


def test_a_damaged_file_whose_hash_was_adapted_is_refused(write: Write) -> None:
    *_, folder = write()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    edited(folder, tensors={"file": "model.safetensors", "sha256": sha256(path)})
    with pytest.raises(DataError, match="is damaged"):
        load(folder, model=Net)


def test_a_manifest_leads_to_no_other_file(write: Write, tmp_path: Path) -> None:
    *_, folder = write()
    _, simulation, *_ = write()
    edited(folder, tensors={"file": "../../etc/passwd", "sha256": sha256(folder / "model.safetensors")})
    with torch.no_grad():
        assert torch.equal(load(folder, model=Net)(BATCH), simulation(BATCH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "holds no stored codes"),
        ({"version": 99}, "has version 99"),
        ({"edges": {}}, "give the model it was made from"),
        ({"weights": {}}, "give the model it was made from"),
        ({"target": {"name": "x86"}}, "does not fit Net"),
        ({"slots": [{"quantizer": {"name": "uniform"}}]}, "does not fit Net"),
        ({"call": {"shape": [4], "dtype": "load"}}, "describes an argument"),
        ({"identities": ["nowhere"]}, "does not fit Net"),
    ],
)
def test_an_edited_manifest_is_refused(write: Write, changes: dict[str, object], message: str) -> None:
    *_, folder = write()
    edited(folder, **changes)
    with pytest.raises(DataError, match=message):
        load(folder, model=Net)


def test_a_manifest_constructs_from_plain_values_only(write: Write) -> None:
    *_, folder = write()
    slots = json.loads((folder / "manifest.json").read_text())["slots"]
    slots[0]["granularity"]["group_size"] = {"_target_": "os.system"}
    edited(folder, slots=slots)
    with pytest.raises(DataError, match="no plain value"):
        load(folder, model=Net)


def test_codes_of_another_shape_are_refused(write: Write) -> None:
    *_, folder = write()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["conv.weight.codes"] = tensors["conv.weight.codes"][:-1].clone()
    save_file(tensors, path)
    edited(folder, tensors={"file": path.name, "sha256": sha256(path)})
    with pytest.raises(DataError, match="215 bytes hold no 216 codes of 8 bits of 'conv:weight'"):
        load(folder, model=Net)


def test_another_model_is_refused(write: Write) -> None:
    *_, folder = write()
    with pytest.raises(DataError, match="give the model it was made from"):
        load(folder, model=nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_a_folder_without_an_engine_asks_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"artifacts": []}')
    with pytest.raises(DataError, match="runs by itself; give the float model"):
        load(tmp_path)


def test_a_report_leads_to_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"")
    report = {"artifacts": [{"exporter": "onnx", "path": "../model.onnx", "sha256": ""}]}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match="lies outside"):
        load(tmp_path / "run")

"""The library: recipes built from plain words, and a run from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.exporter.safetensors import SafetensorsExporter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import qpipe
from qpipe.choices import build_recipe, library_config
from qpipe.console import summary
from qpipe.errors import DataError, GateError, RecipeError
from qpipe.nn import remove_weight_quantizer, weight_quantizers
from qpipe.pipeline import _quiet_trainer, run
from qpipe.recipe import SlotEdit
from qpipe.registry import PluginRegistry
from qpipe.stages.data import as_datamodule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry.load_installed()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> Tensor:
    return torch.randn(128, 16, generator=torch.Generator().manual_seed(1))


def recipe(registry: PluginRegistry, **choices: Any) -> qpipe.Recipe:  # noqa: ANN401
    return build_recipe(library_config(choices, exporting=False), registry)


def test_quantize_leaves_the_users_model_alone(net: Net, batches: Tensor) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    quantized, report = qpipe.quantize(net, batches, quantizer="kl", granularity="channel")
    assert net.training
    assert type(net.first) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    expected, got = net(batches), quantized(batches)
    sqnr = 10 * torch.log10(expected.square().sum() / (got - expected).square().sum()).item()
    assert report.metrics["simulated"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)
    assert sqnr > 25


def test_fewer_bits_are_worse_and_smaller(net: Net, batches: Tensor) -> None:
    figures = [
        qpipe.quantize(net, batches, weight={"num_bits": bits})[1].metrics["simulated"] for bits in (8, 4, 2)
    ]
    assert figures[0]["sqnr_db"] > figures[1]["sqnr_db"] > figures[2]["sqnr_db"]
    assert figures[0]["size_bytes"] > figures[1]["size_bytes"] > figures[2]["size_bytes"]


def test_a_run_leaves_its_folder_whole(net: Net, batches: Tensor, tmp_path: Path) -> None:
    _, report = qpipe.quantize(net, batches, out=tmp_path / "run", exporter=[])
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert record["metrics"]["simulated"] == report.metrics["simulated"]
    assert [edge["name"] for edge in record["edges"]] == [edge["name"] for edge in report.edges]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_exact_copy_is_recorded_as_strict_json(net: Net, batches: Tensor, tmp_path: Path) -> None:
    qpipe.quantize(net, batches, out=tmp_path / "run", exporter=[], weight=None, activation=None)

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    record = json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=refuse)
    assert record["metrics"]["simulated"]["sqnr_db"] == "inf"


def test_a_failed_run_leaves_nothing(net: Net, batches: Tensor, tmp_path: Path) -> None:
    batches[100] = torch.nan
    with pytest.raises(DataError, match="'input'"):
        qpipe.quantize(net, batches, out=tmp_path / "run", exporter=[])
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_holds_files_is_refused(net: Net, batches: Tensor, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RecipeError, match="choose another"):
        qpipe.quantize(net, batches, out=tmp_path, exporter=[])
    assert (tmp_path / "mine.txt").read_text() == "keep me"


class Unread(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("data was read")


class Narrower(qpipe.FinetuneStrategy):
    """Give one weight six bits and take another out of quantization."""

    name = "narrower"

    def edits(self, recipe: qpipe.Recipe) -> list[tuple[qpipe.Role, SlotEdit]]:
        return [(qpipe.Role.WEIGHT, SlotEdit(spec={"num_bits": 6}))]

    def fit(self, model: nn.Module, *_: Any) -> dict[str, Any]:  # noqa: ANN401
        first, second = weight_quantizers(model)
        first.fake_quant.slot = replace(
            first.fake_quant.slot, spec=replace(first.fake_quant.slot.spec, num_bits=6)
        )
        remove_weight_quantizer(second.module, second.parameter_name)
        rows = [{"layer": "first", "bits": 6, "share": 0.123456}]
        return {"simulated.narrower": {"rows": rows, "said": "narrower: done", "print": ["rows", "said"]}}


def test_the_report_shows_what_fine_tuning_made_of_slots(
    net: Net, batches: Tensor, registry: PluginRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = replace(recipe(registry), finetune=(Narrower(),), exporters=(SafetensorsExporter(),))
    _, report = run(net, as_datamodule(batches), qpipe.Task(), chosen, _quiet_trainer())
    assert [(row["name"], row["num_bits"]) for row in report.weights] == [("first:weight", 6)]
    assert report.skipped["second:weight"] == "calibration or fine-tuning left it in floating point"
    assert report.artifacts[0].proof == {"bit_equal": True}
    summary(report)
    printed = capsys.readouterr().out
    assert "first  6     0.1235" in printed
    assert "narrower: done" in printed


def test_exporters_are_asked_about_slots_that_fine_tuning_may_choose(registry: PluginRegistry) -> None:
    words = library_config({"exporter": ["onnx"], "finetune": ["wider"]}, exporting=True)

    class Wider(Narrower):
        def edits(self, recipe: qpipe.Recipe) -> list[tuple[qpipe.Role, SlotEdit]]:
            return [(qpipe.Role.WEIGHT, SlotEdit(spec={"num_bits": 12}))]

    wider = replace(registry.plugins["finetune"]["none"], name="wider", cls=Wider)
    finetune = {**registry.plugins["finetune"], "wider": wider}
    mine = PluginRegistry({**registry.plugins, "finetune": finetune})
    with pytest.raises(RecipeError, match=r"exporter 'onnx' .*num_bits=12"):
        build_recipe(words, mine)


def test_a_gate_on_what_is_not_measured_is_refused_before_data_is_read(net: Net) -> None:
    loader = DataLoader(Unread())
    for gate, said in (
        ({"metric": "top5_percent", "min": 1}, "measured: size_bytes, sqnr_db"),
        ({"metric": "sqnr_db", "max_drop": 1}, "give gate.min="),
        ({"max": 1}, "gate takes metric, max_drop, min"),
    ):
        with pytest.raises(RecipeError, match=said):
            qpipe.quantize(net, loader, gate=gate)


def test_a_gate_that_is_missed_keeps_the_folder(net: Net, batches: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(GateError, match="at least 200"):
        qpipe.quantize(net, batches, gate={"metric": "sqnr_db", "min": 200}, out=out, exporter=[])
    assert (tmp_path / "run" / "report.json").is_file()


def test_a_shared_word_gets_a_stand_in_that_is_named(registry: PluginRegistry) -> None:
    built = recipe(registry, quantizer="kl")
    assert built.weight is not None
    assert built.activation is not None
    assert (built.weight.calibrator.name, built.activation.calibrator.name) == ("minmax", "kl")
    assert any("'kl'" in notice and "'minmax'" in notice for notice in built.notices)


def test_an_explicit_calibrator_wins_over_the_presets(registry: PluginRegistry) -> None:
    built = recipe(registry, quantizer="kl", calibrator="percentile")
    assert built.activation is not None
    assert built.activation.calibrator.name == "percentile"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"calibrator": "mes"}, "did you mean 'mse'"),
        ({"quantizer": "klx"}, r"no quantizer named 'klx'; did you mean 'kl'\? installed: .*mxfp4"),
        ({"weight": {"calibrator": "kl"}}, r"calibrator 'kl' cannot serve weights \(weight.calibrator=kl\)"),
        ({"weight": {"num_bitz": 4}}, "weight has no key 'num_bitz'"),
        ({"weight": {"dynamic": True}}, "no meaning"),
        ({"activation": {"granularity": "token"}}, "activation.dynamic=true"),
        ({"activation": {"granularity": "channel"}}, "cannot serve activations"),
        ({"weight": {"num_bits": 1}}, "2"),
        ({"layers": [{"mach": "x"}]}, "a layer rule is"),
        ({"layers": [{"match": "x"}]}, "changes nothing"),
        ({"target": "x68"}, "no target named 'x68'"),
        ({"quantiser": "kl"}, "no argument 'quantiser'"),
    ],
)
def test_choices_without_meaning_are_one_sentence(
    registry: PluginRegistry, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(qpipe.QpipeError, match=message):
        recipe(registry, **choices)


def test_layer_rules_apply_first_to_last(registry: PluginRegistry) -> None:
    rules = [
        {"match": "*", "weight": {"num_bits": 4}},
        {"match": "fir*", "weight": {"calibrator": "mse"}},
        {"match": "second", "weight": None},
    ]
    built = recipe(registry, layers=rules)
    first, second = (built.slot(name, qpipe.Role.WEIGHT) for name in ("first", "second"))
    assert first is not None
    assert (first.spec.num_bits, first.calibrator.name) == (4, "mse")
    assert second is None


def test_the_trainer_and_task_are_the_users(net: Net, batches: Tensor) -> None:
    from pytorch_lightning import Trainer

    from qpipe.stages.data import as_datamodule

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    built = recipe(PluginRegistry.load_installed(), weight=None)
    _, report = run(net, as_datamodule(batches), qpipe.Task(class_dim=None), built, trainer, num_samples=64)
    assert "agreement_percent" not in report.metrics["simulated"]
    assert report.weights == ()
    assert report.edges != ()


class Clipped(nn.Module):
    """Two layers of very unequal channels with a ReLU6 between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.clip = nn.ReLU6()
        self.second = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-2, 0, 8).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.clip(self.first(x))).mean((2, 3))


def test_what_a_transform_changed_is_exported_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = Clipped(), torch.randn(32, 3, 8, 8)
    quantized, report = qpipe.quantize(
        net, images, out=tmp_path / "run", granularity="layer", transform=["fold_bn", "equalize"]
    )
    assert [artifact.exporter for artifact in report.artifacts] == ["safetensors", "onnx"]
    assert "clip.high" in quantized.state_dict()
    assert report.metrics["onnx"]["sqnr_db"] > 25
    with torch.no_grad():
        assert torch.equal(qpipe.load(tmp_path / "run", model=Clipped())(images), quantized(images))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"weight": {"num_bits": "four"}}, "weight.num_bits=four has no meaning; give a whole number"),
        ({"activation": {"signed": "maybe"}}, "activation.signed=maybe has no meaning; give true or false"),
        ({"weight": 4}, "weight=4 is no slot; give its keys, weight.num_bits=4, or null"),
        ({"layers": "stem"}, "layers is a list of rules, "),
        ({"layers": ["stem"]}, "a layer rule is {match: pattern, "),
        ({"layers": [{"match": "stem", "weight": 4}]}, "a layer rule is {match: pattern, "),
        ({"layers": [{"match": 3, "weight": None}]}, "a layer rule is {match: pattern, "),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe(library_config(choices, exporting=False), PluginRegistry.load_installed())
    assert said in str(error.value)

"""Bits chosen for a budget, from the first word to the stored model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import qpipe
from qpipe.config import compose_config
from qpipe.errors import RecipeError
from qpipe.nn import edge_quantizers, weight_quantizers
from qpipe.packing import payload_bytes


class Net(nn.Module):
    """Convolutions, a tied linear layer, and a recurrent one whose weights share a path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x, _ = self.rnn(x.flatten(2).transpose(1, 2))
        return self.last(torch.relu(self.tied(torch.relu(self.head(x[:, -1])))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def allocated(
    net: Net,
    data: Tensor,
    budget: dict[str, float],
    **more: Any,  # noqa: ANN401
) -> tuple[nn.Module, qpipe.Report]:
    options = {key: more.pop(key) for key in ("sensitivity", "bits") if key in more}
    strategy = {"name": "allocate", "budget": budget, "num_samples": 16, **options}
    return qpipe.quantize(net, data, finetune=[strategy], target="generic", **more)


def average_bits(report: qpipe.Report) -> float:
    sizes = [torch.Size(row["shape"]).numel() for row in report.weights]
    return sum(n * row["num_bits"] for n, row in zip(sizes, report.weights, strict=True)) / sum(sizes)


@pytest.mark.parametrize("sensitivity", ["sqnr", "kl", "hessian"])
def test_a_looser_budget_is_met_and_loses_less(net: Net, data: Tensor, sensitivity: str) -> None:
    quality = []
    for bits in (2.5, 4, 6):
        _, report = allocated(net, data, {"average_bits": bits}, activation=None, sensitivity=sensitivity)
        assert bits - 1 < average_bits(report) <= bits
        quality.append(report.metrics["simulated"]["sqnr_db"])
    assert quality[0] < quality[1] < quality[2]


def test_the_budget_counts_the_bytes_that_are_reported(net: Net, data: Tensor) -> None:
    whole = payload_bytes(net)
    for budget in (0.3, round(0.4 * whole)):
        quantized, report = allocated(net, data, {"size": budget})
        size = report.metrics["simulated"]["size_bytes"]
        assert size == payload_bytes(quantized)
        assert f"allocation: {size:,.0f} bytes" in report.tables["simulated.allocate"]["finding"]
        assert 0.9 * budget < (size / whole if budget < 1 else size) <= budget


def test_bit_operations_are_macs_times_the_bits_of_weight_and_input(net: Net, data: Tensor) -> None:
    quantized, report = allocated(net, data, {"bops": 0.06}, layers=[{"match": "input", "activation": None}])
    bits = {row["layer"]: row["bits"] for row in report.tables["simulated.allocate"]["layers"]}
    inputs = {path: e.slot.spec.num_bits for e in edge_quantizers(quantized) for path in e.edge.consumers}
    macs = {"stem": 36 * 72, "depthwise": 16 * 72, "head": 64, "last": 32}  # the LSTM's are not counted
    assert "stem" not in inputs
    spent = sum(n * bits[path] * inputs.get(path, 32) for path, n in macs.items())
    said = report.tables["simulated.allocate"]["finding"]
    assert f"allocation: {spent:,} bit operations" in said
    assert spent <= 0.06 * sum(macs.values()) * 32 * 32


def test_the_printed_rules_give_the_identical_model(net: Net, data: Tensor) -> None:
    ours = {"calibrator": "mse", "layers": [{"match": "stem", "weight": {"num_bits": 8}}]}
    quantized, report = allocated(net, data, {"average_bits": 3.5}, **ours)
    rules = re.search(r'layers="\[your own rules,(.*)\]"', report.tables["simulated.allocate"]["rules"])
    assert rules is not None
    pasted = yaml.safe_load(f"[{rules[1]}]".replace(":", ": "))
    again, other = qpipe.quantize(
        net, data, target="generic", **{**ours, "layers": [*ours["layers"], *pasted]}
    )
    assert [row for row in report.weights] == [row for row in other.weights]
    assert len({row["num_bits"] for row in report.weights}) > 1
    assert quantized.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in quantized.state_dict().items())
    assert torch.equal(quantized(data), again(data))


def test_the_layers_that_lose_most_stay_in_floating_point(net: Net, data: Tensor) -> None:
    quantized, report = allocated(net, data, {"size": 0.6}, bits=[2, 32], activation=None)
    assert report.metrics["simulated"]["size_bytes"] == payload_bytes(quantized) <= 0.6 * payload_bytes(net)
    table = report.tables["simulated.allocate"]
    bits = {row["layer"]: row["bits"] for row in table["layers"]}
    assert set(bits.values()) == {2, 32}
    coded = {row["name"].rpartition(":")[0] for row in report.weights}
    assert coded == {path for path, width in bits.items() if width == 2}
    rules = yaml.safe_load(table["rules"].partition('layers="')[2].rstrip('"').replace(":", ": "))
    again, _ = qpipe.quantize(net, data, target="generic", activation=None, layers=rules)
    assert torch.equal(quantized(data), again(data))
    one = {"sensitivity": "hessian", "bits": [2, 32], "activation": None}
    assert allocated(net, data, {"average_bits": 32}, **one)[1].metrics["simulated"]["sqnr_db"] > 120


def test_rules_fix_a_width_and_a_module_has_one_width(net: Net, data: Tensor) -> None:
    quantized, report = allocated(
        net, data, {"average_bits": 3}, layers=[{"match": "last", "weight": {"num_bits": 7}}]
    )
    bits = {row["name"]: row["num_bits"] for row in report.weights}
    assert bits["last:weight"] == 7
    assert bits["rnn:weight_ih_l0"] == bits["rnn:weight_hh_l0"]
    (row,) = [row for row in report.tables["simulated.allocate"]["layers"] if row["layer"] == "last"]
    assert row["because"] == "a rule fixes it"
    shared = {w.name: w.fake_quant for w in weight_quantizers(quantized)}
    assert shared["head:weight"] is shared["tied:weight"]


def test_the_front_is_stored_and_everything_has_a_page(net: Net, data: Tensor, tmp_path: Path) -> None:
    _, report = allocated(net, data, {"size": 0.4}, bits=[2, 4, 8], out=tmp_path / "run", exporter=[])
    front = report.tables["simulated.allocate"]["front"]
    costs, losses = ([point[key] for point in front] for key in ("bytes", "loss"))
    assert 3 < len(costs) <= 64
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert set(front[0]["bits"].split()) == {"2"}
    assert set(front[-1]["bits"].split()) == {"8"}
    assert "because" in (tmp_path / "run" / "csv" / "simulated.allocate.layers.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {}}, "give one budget"),
        ({"budget": {"size": 0.2, "bops": 0.1}}, "give one budget"),
        ({"budget": {"weight": 3}}, "a budget is one of size"),
        ({"budget": {"size": "small"}}, "is no number above 0"),
        ({"budget": {"size": 0.2}, "sensitivity": "guess"}, "sensitivity is sqnr or kl or hessian"),
        ({"budget": {"size": 0.2}, "bits": [0]}, "bits are whole numbers"),
        ({"budget": {"size": 0.2}, "bits": [32]}, "leave nothing to quantize"),
        ({"budget": {"size": 0.2}, "bits": [8, 32]}, "add activation=null"),
        ({"budget": {"latency": 0.5}}, r"none of the exporters \(there is none\) times its operations"),
        (
            {"budget": {"size": 0.001}},
            r"budget.size=0.001 \(3 bytes\) is out of reach: the cheapest widths take [\d,]+ bytes",
        ),
    ],
)
def test_what_has_no_meaning_is_one_sentence(net: Net, data: Tensor, options: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(RecipeError, match=message):
        qpipe.quantize(net, data, finetune=[{"name": "allocate", **options}], target="generic")


def test_allocation_comes_first_and_needs_weights_and_classes(net: Net, data: Tensor) -> None:
    mine = {"name": "allocate", "budget": {"size": 0.3}}
    for words, message in (
        ({"finetune": ["bias_correction", mine]}, "put allocate first"),
        ({"finetune": [mine], "weight": None}, "no bits to choose"),
        ({"finetune": [{**mine, "sensitivity": "kl"}], "task": qpipe.Task(None)}, "task.class_dim=null"),
        ({"finetune": [mine], "quantizer": "nf4", "weight": {"num_bits": 4}}, "'allocate' may choose .*nf4"),
    ):
        with pytest.raises(RecipeError, match=message):
            qpipe.quantize(net, data, target="generic", **words)


def test_the_command_line_reads_well() -> None:
    config = compose_config(["bits=auto", "budget.size=0.2", "finetune=[gptq]"])
    assert [*config["finetune"]] == ["allocate", "gptq"]
    assert config["finetune"]["allocate"]["budget"] == {
        "size": 0.2,
        "average_bits": None,
        "bops": None,
        "latency": None,
    }
    assert "budget" not in config  # repeated from config.yaml, it would have no effect
    with pytest.raises(RecipeError, match=r"'budget' is a word of bits=auto.*add bits=auto"):
        compose_config(["budget.size=0.2"])
    with pytest.raises(RecipeError, match=r"did you mean 'size'"):
        compose_config(["bits=auto", "budget.sise=0.2"])

"""What is executed at each width, what it costs, and the real engine's answer."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qpipe_methods.allocation import Ledger, front
from qpipe_methods.latency import by_width, microseconds, priced
from qpipe_methods.sensitivity import Candidates, Choice, candidates
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import Tensor, nn

import qpipe
from qpipe import Operation, Recipe, Shelf, Target
from qpipe.cache import Store
from qpipe.errors import RecipeError
from qpipe.nn import weight_quantizers

WIDTHS = (2, 3, 4, 5, 6, 8)


@given(st.lists(st.sampled_from(["int2", "int4", "int8"]), min_size=6, max_size=6).map(sorted))
def test_a_width_between_two_of_equal_kernels_is_not_executed(stored: list[str]) -> None:
    kernels = dict(zip(WIDTHS, stored, strict=True))
    asked: list[int] = []

    def executed(width: int) -> list[Operation]:
        asked.append(width)
        return [Operation("fc", kernels[width], width)]

    files = by_width(WIDTHS, executed)
    assert {width: file[0].kernel for width, file in files.items()} == kernels
    assert len(asked) == len({*asked})
    if len({*stored}) == 1:
        assert asked == [2, 8]


def found(*layers: str) -> list[Candidates]:
    choices = tuple(Choice(width, ()) for width in (4, 8, 32))
    return [Candidates(layer, (), choices) for layer in layers]


def test_equal_kernels_have_one_price_and_the_rest_is_counted_once() -> None:
    files = {
        4: [Operation("", "input", 3), Operation("a", "int8", 20), Operation("tied", "int8", 27)],
        8: [Operation("", "input", 2), Operation("a", "int8", 22), Operation("tied", "int8", 21)],
        32: [Operation("", "input", 4), Operation("a", "float", 50), Operation("tied", "other", 60)],
    }
    costs, rest, whole = priced(found("a", "b"), files, {"a": "a", "b": "b", "tied": "b"})
    assert costs == [[20, 20, 50], [20, 20, 60]]
    assert (rest, whole) == (2, 112)


@given(st.lists(st.integers(1, 40), min_size=9, max_size=9), st.integers(1, 130), st.randoms())
def test_the_choice_within_a_latency_is_that_of_trying_all(times: list[int], budget: int, draw: Any) -> None:  # noqa: ANN401
    files = {
        width: [Operation(layer, f"{layer} {width}", times[3 * i + j]) for j, layer in enumerate("abc")]
        for i, width in enumerate((4, 8, 32))
    }
    costs, rest, whole = priced(found(*"abc"), files, {layer: layer for layer in "abc"})
    losses = [[*sorted((draw.random(), draw.random()), reverse=True), 0.0] for _ in costs]
    ledger = Ledger("µs", costs, rest, whole, unit_of_budget=1000)
    points, share = front(costs, losses), budget / whole
    within = [
        sum(own[i] for own, i in zip(losses, picks, strict=True))
        for picks in itertools.product(range(3), repeat=3)
        if sum(own[i] for own, i in zip(costs, picks, strict=True))
        <= (share * whole if share <= 1 else 1e3 * share)
    ]
    best = points.best(ledger.limit(share))
    assert (best is None) == (not within)
    if best is not None:
        assert points.losses[best] == pytest.approx(min(within))


class Net(nn.Module):
    """Products of weights alone, large enough that their time is more than the clock's step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 256)
        self.blocks = nn.Sequential(*[nn.Linear(256, 256) for _ in range(2)])
        self.head = nn.Linear(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(torch.relu(self.embed(x))))
        return logits


ALONE: dict[str, Any] = {
    "activation": None,
    "target": "generic",
    "granularity": {"name": "subchannel", "group_size": 32},
    "exporter": ["onnx"],
}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


def test_times_are_those_of_kernels_and_are_kept(
    net: Net, data: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five bits are stored like eight, four and floating point are not; a second look executes nothing."""
    model, _ = qpipe.quantize(net, data, **{**ALONE, "exporter": []})
    every = candidates(model, [4, 5, 8, 32], lambda path: False)
    recipe = Recipe(None, None, Target("t", ()), exporters=(OnnxExporter(),))
    recipe = replace(recipe, shelf=Shelf(Store(tmp_path)))
    asked: list[list[str]] = []
    operations = OnnxExporter.operations

    def counted(self: OnnxExporter, *args: Any) -> list[Operation]:  # noqa: ANN401
        found = operations(self, *args)
        asked.append(sorted({operation.kernel.split()[0] for operation in found}))
        return found

    monkeypatch.setattr(OnnxExporter, "operations", counted)
    costs, rest, whole = microseconds(every, model, ((data,), {}), recipe)
    assert [each.path for each in every] == ["embed", "blocks.0", "blocks.1", "head"]
    assert all(five == eight for _, five, eight, _ in costs)
    assert all(sum(of_width) > 0 for of_width in zip(*costs, strict=True))
    assert costs[1] == costs[2]  # of one shape
    assert rest + sum(own[-1] for own in costs) == whole  # all in floating point is the float model
    assert ["MatMulNBits" in kernels for kernels in asked] == [False, True, True, True]
    monkeypatch.setattr(OnnxExporter, "operations", lambda *_: pytest.fail("executed again"))
    assert microseconds(every, model, ((data,), {}), recipe) == (costs, rest, whole)


def allocated(net: Net, data: Tensor, budget: float) -> tuple[int, qpipe.Report]:
    """Return what a run says it spends, in microseconds, and its report."""
    strategy = {"name": "allocate", "budget": {"latency": budget}, "bits": [4, 8, 32], "num_samples": 8}
    _, report = qpipe.quantize(net, data, **ALONE, finetune=[strategy], evaluator=["sqnr"])
    spent = re.search(r"allocation: ([\d,]+) µs", report.tables["simulated.allocate"]["finding"])
    assert spent is not None
    return int(spent[1].replace(",", "")), report


def test_the_file_is_measured_and_written(net: Net, data: Tensor) -> None:
    spent, report = allocated(net, data, 50.0)  # milliseconds: so much that nothing need be quantized
    assert 0 < spent <= 50_000
    table = report.tables["simulated.allocate"]
    assert [row["bits"] for row in table["layers"]] == [32, 32, 32, 32]
    assert table["front"][-1]["µs"] == spent
    assert not {"MatMulNBits", "DequantizeLinear"} & {*report.artifacts[0].proof["nodes"]}


def test_a_looser_budget_is_met_and_loses_less(
    net: Net, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own: a layer takes 30 µs in four bits, 8 in eight, 20 in float; the rest 4."""

    def operations(self: OnnxExporter, model: nn.Module, *_: Any) -> list[Operation]:  # noqa: ANN401
        weights = {w.name.rpartition(":")[0]: w.fake_quant for w in weight_quantizers(model)}
        times = {
            name: {4: 30, 8: 8}[f.slot.spec.num_bits] if f.enabled else 20 for name, f in weights.items()
        }
        return [Operation("", "input", 4), *(Operation(name, f"in {us}", us) for name, us in times.items())]

    monkeypatch.setattr(OnnxExporter, "operations", operations)
    quality = []
    for budget, floats in ((0.6, 1), (0.8, 2)):  # of 84 µs; eight bits throughout take 36
        spent, report = allocated(net, data, budget)
        layers = report.tables["simulated.allocate"]["layers"]
        assert sorted(layer["bits"] for layer in layers) == [8] * (4 - floats) + [32] * floats
        assert spent == 36 + 12 * floats <= 84 * budget
        because = next(layer["because"] for layer in layers if layer["bits"] == 8)
        assert because.endswith("at 4 bits for 22 µs more; no error at 32 bits for 12 µs more")
        quality.append(report.metrics["simulated"]["sqnr_db"])
    assert quality[0] < quality[1]
    with pytest.raises(
        RecipeError, match=r"latency=0.4 \(33 µs\) is out of reach: the cheapest widths take 36 µs"
    ):
        allocated(net, data, 0.4)

"""What is given up until the gate holds, and that it is the least."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.finetune.revert import FLOAT_BITS, Part, Revert, fewest
from torch import Tensor, nn

import qpipe
from qpipe.errors import GateError, RecipeError
from qpipe.nn import FakeQuant

SQNR = "sqnr_db"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.third, self.last = nn.Linear(128, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.third(x.flatten(1))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def reverted(
    net: Net,
    data: Tensor,
    least: float,
    before: tuple[Any, ...] = (),
    bits: tuple[int, ...] = (8,),
    **more: Any,  # noqa: ANN401
) -> tuple[nn.Module, qpipe.Report]:
    words = {"target": "generic", "gate": {"metric": SQNR, "min": least}, **more}
    return qpipe.quantize(net, data, finetune=[*before, {"name": "revert", "bits": bits}], **words)


def sqnr_db(output: Tensor, expected: Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (output - expected).square().sum()).item()


def test_the_one_bad_layer_is_raised_and_no_other(net: Net, data: Tensor) -> None:
    bad = [{"match": "third", "weight": {"num_bits": 2}}]
    _, plain = qpipe.quantize(net, data, layers=bad, target="generic")
    assert plain.metrics["simulated"][SQNR] < 30
    _, report = reverted(net, data, 30, layers=bad)
    assert [
        (row["given up"], row["was"], row["is"]) for row in report.tables["simulated.revert"]["rows"]
    ] == [("third", "2 bits", "8 bits")]
    assert {row["num_bits"] for row in report.weights} == {8}
    assert report.metrics["simulated"][SQNR] > 30
    assert (
        float(report.tables["simulated.revert"]["rows"][0]["error that goes with it"].removesuffix(" %")) > 90
    )


def quantizer(num_bits: int) -> FakeQuant:
    layer = qpipe.quantize(nn.Linear(2, 2), torch.rand(4, 2), weight={"num_bits": num_bits}, evaluator=[])[0]
    return next(m for m in layer.modules() if isinstance(m, FakeQuant) and m.slot.spec.num_bits == num_bits)


def test_the_worst_goes_first_through_every_width() -> None:
    def part(name: str, num_bits: int, is_edge: bool = False) -> Part:
        weight: Any = None
        return Part(name, (quantizer(num_bits),), () if is_edge else (weight,))

    good, edge, worst = part("good", 4), part("edge", 8, is_edge=True), part("worst", 2)
    steps = Revert(bits=(4, 8)).steps({good: 0.1, edge: 0.2, worst: 0.5})
    floats = [(p, FLOAT_BITS) for p in (worst, edge, good)]
    assert steps == [(worst, 4), (worst, 8), (good, 8), *floats]


def test_what_holds_is_left_alone(net: Net, data: Tensor) -> None:
    plain, _ = qpipe.quantize(net, data, target="generic")
    kept, report = reverted(net, data, 20)
    assert (
        report.tables["simulated.revert"]["finding"]
        == "revert: the gate holds as it is; nothing was given up"
    )
    assert torch.equal(plain(data), kept(data))


def test_one_less_would_not_do(net: Net, data: Tensor, tmp_path: Path) -> None:
    _, plain = qpipe.quantize(net, data, target="generic")
    least = plain.metrics["simulated"][SQNR] + 8
    _, report = reverted(net, data, least, out=tmp_path / "run", exporter=["safetensors"])
    assert report.metrics["simulated"][SQNR] >= least
    assert report.artifacts[0].proof == {"bit_equal": True}
    given_up = report.tables["simulated.revert"]["rows"]
    assert {row["is"] for row in given_up} == {"floating point"}
    assert {row["of"] for row in given_up} == {"weights", "activations"}
    weights = {f"{row['given up']}:weight" for row in given_up if row["of"] == "weights"}
    edges = {row["given up"] for row in given_up if row["of"] == "activations"}
    assert not weights & {row["name"] for row in report.weights}
    assert not edges & {row["name"] for row in report.edges}
    assert weights | edges <= set(report.skipped)
    role = {"weights": "weight", "activations": "activation"}
    rules = [{"match": row["given up"], role[row["of"]]: None} for row in given_up]
    one_less, _ = qpipe.quantize(net, data, target="generic", layers=rules[:-1])
    assert sqnr_db(one_less(data), net(data)) < least
    the_same, _ = qpipe.quantize(net, data, target="generic", layers=rules)
    assert sqnr_db(the_same(data), net(data)) >= least


def test_tuned_layers_go_back_to_their_float_weights(net: Net, data: Tensor) -> None:
    before = copy.deepcopy(net)
    tuned = (
        {"name": "gptq", "num_samples": 32},
        {"name": "bias_correction", "num_samples": 32},
    )
    quantized, report = reverted(
        net, data, 35, tuned, bits=(), weight={"num_bits": 3}, activation=None, granularity="layer"
    )
    floats = [
        row["given up"] for row in report.tables["simulated.revert"]["rows"] if row["is"] == "floating point"
    ]
    assert floats
    for name in floats:
        module, original = quantized.get_submodule(name), before.get_submodule(name)
        assert torch.equal(module.weight, original.weight)
        assert torch.equal(module.bias, original.bias)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_a_gate_beyond_floating_point_fails_and_changes_nothing(net: Net, data: Tensor) -> None:
    with pytest.raises(GateError, match="at least 10"):
        reverted(net, data, 10, gate={"metric": "mean_cosine", "min": 10})


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_halving_finds_the_least(count: int) -> None:
    for least in range(1, count + 1):
        asked: list[int] = []

        def holds(n: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n >= least

        assert fewest(count, holds) == least
        assert len(asked) <= count.bit_length() + 1
    assert fewest(count, lambda _: False) is None


def test_what_has_no_meaning_is_one_sentence(net: Net, data: Tensor) -> None:
    gate = {"metric": SQNR, "min": 30}
    for words, message in (
        ({"finetune": ["revert"]}, "give one: gate.max_drop=1"),
        ({"finetune": ["revert", "bias_correction"], "gate": gate}, "put revert last"),
        ({"finetune": ["revert"], "gate": {"metric": "size_bytes", "min": 1}}, "no figure of the outputs"),
        ({"finetune": [{"name": "revert", "bits": [8, 4]}], "gate": gate}, "bits are rising"),
    ):
        with pytest.raises(RecipeError, match=message):
            qpipe.quantize(net, data, **words)

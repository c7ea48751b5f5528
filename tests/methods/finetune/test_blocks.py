from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from qpipe_methods.finetune import autoround
from qpipe_methods.finetune.autoround import AutoRound, Offset
from qpipe_methods.finetune.brecq import batch_error
from qpipe_methods.reconstruction import Unit
from torch import Tensor, nn

import qpipe
from qpipe import QParams, Shelf, Task

PLAIN: dict[str, Any] = {"activation": None, "target": "generic", "evaluator": [], "transform": []}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Data(LightningDataModule):
    def __init__(self, batches: list[Tensor]) -> None:
        super().__init__()
        self.batches = batches

    def calibration_dataloader(self) -> list[Tensor]:
        return self.batches


def inputs(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(12, 12, generator=generator)
    return [torch.randn(32, 12, generator=generator) @ mixing for _ in range(count)]


def quantized(net: nn.Module, data: list[Tensor], **weight: Any) -> nn.Module:  # noqa: ANN401
    return qpipe.quantize(net, data, weight={"num_bits": 3, **weight}, **PLAIN)[0]


def fit(strategy: AutoRound, model: nn.Module, data: list[Tensor]) -> None:
    strategy.fit(model, None, Data(data), Task(), SimpleNamespace(shelf=Shelf()), None)  # type: ignore[arg-type]


def gap(model: nn.Module, net: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return (model(torch.cat(data)) - net(torch.cat(data))).square().mean().item()


def test_a_step_moves_offsets_against_the_sign_of_the_gradient() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(12, 6)), inputs(1)
    model = quantized(net, data)
    layer: Any = model[0]  # type: ignore[index]
    weight, scale = net[0].weight.detach(), layer.weight_quantizer.scale
    rounded = (weight / scale).round().clamp(-3, 3) * scale
    slope = 2 * (rounded - weight) @ data[0].T @ data[0]
    expected = (weight / scale - 0.05 * slope.sign()).round().clamp(-3, 3) * scale
    assert not torch.equal(expected, rounded)
    fit(AutoRound("block", iterations=1, lr=0.05, ranges=False), model, data)
    torch.testing.assert_close(layer.weight, expected)


def test_a_block_errs_less_than_its_layers_one_by_one() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(Block(), Block()), inputs()
    models = [quantized(net, data) for _ in range(3)]
    fit(AutoRound("layer", iterations=200), models[1], data)
    fit(AutoRound("block", iterations=200), models[2], data)
    nearest, by_layer, by_block = (gap(model, net, data) for model in models)
    assert by_block < 0.9 * by_layer < by_layer < nearest


def test_ranges_of_a_block_are_learned_and_weights_lie_on_their_levels() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(Block(), Block()), inputs()
    asymmetric = {"symmetric": False, "signed": False, "restricted": False}
    before, after = (quantized(net, data, **asymmetric) for _ in range(2))
    fit(AutoRound("block", iterations=50), after, data)
    first: list[Any] = [model[0].first for model in (before, after)]  # type: ignore[index]
    assert (first[1].weight_quantizer.scale < first[0].weight_quantizer.scale).any()
    stored = first[1]._parameters["weight"].detach()
    torch.testing.assert_close(first[1].weight, stored)


def test_the_ends_of_the_codes_move_with_the_range() -> None:
    net, data = nn.Sequential(nn.Linear(12, 6)), inputs(1)
    model = quantized(net, data, num_bits=8, symmetric=False, signed=False, restricted=False)
    quantizer: Any = model[0].weight_quantizer  # type: ignore[index]
    spec, weight = quantizer.slot.spec, net[0].weight.detach()
    offset = Offset(quantizer.slot, quantizer.qparams(), weight, ranges=True)
    learned = offset.qparams()
    ends = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    for i, code in enumerate((spec.quant_min, spec.quant_max)):
        value = (learned.scale * (code - learned.zero_point)).sum()
        (slope,) = torch.autograd.grad(value, offset.shrink, retain_graph=True)
        expected = torch.stack([ends[j] if i == j else torch.zeros_like(ends[j]) for j in range(2)])
        torch.testing.assert_close(slope, expected, atol=0.01, rtol=0)  # a zero point is rounded: half a code


@pytest.mark.parametrize("clipped", [False, True])
def test_a_range_starts_at_the_ends_of_the_weights_and_a_clipped_one_where_it_was(clipped: bool) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(12, 6)), inputs(1)
    model = quantized(net, data, symmetric=False, signed=False, restricted=False)
    quantizer: Any = model[0].weight_quantizer  # type: ignore[index]
    start, weight = quantizer.qparams(), net[0].weight.detach()
    if clipped:
        start = QParams(start.scale / 3, (start.zero_point / 3).round())
    offset = Offset(quantizer.slot, start, weight, ranges=True)
    learned = offset.qparams()
    torch.testing.assert_close(learned.scale, start.scale)
    torch.testing.assert_close(learned.zero_point, start.zero_point)
    own = (offset.ends.low - weight.amin(1, keepdim=True)).abs() < 1e-6
    assert not own.any() if clipped else own.all()
    if not clipped:
        torch.testing.assert_close(offset.ends.high, weight.amax(1, keepdim=True))


def test_every_batch_is_seen_before_one_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noting(unit: Unit, b: int) -> Tensor:
        seen.append(b)
        return batch_error(unit, b)

    monkeypatch.setattr(autoround, "batch_error", noting)
    net, data = nn.Sequential(nn.Linear(12, 6)), inputs(4)
    fit(AutoRound("block", iterations=10), quantized(net, data), data)
    assert sorted(seen[:4]) == sorted(seen[4:8]) == [0, 1, 2, 3]
    assert seen[:4] != seen[4:8]
    assert len(seen) == 10


def test_steps_that_only_harm_are_undone() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(Block(), Block()), inputs()
    model = quantized(net, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(AutoRound("block", iterations=1, lr=9.0), model, data)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="unit is layer or block, not 'network'"):
        AutoRound("network")
    with pytest.raises(ValueError, match="match=float is a layer's aim"):
        AutoRound("block", match="float")

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from qpipe_methods.finetune import autoround
from qpipe_methods.finetune.adaround import AdaRound, inverse_h
from qpipe_methods.finetune.autoround import AutoRound, Offset
from qpipe_methods.finetune.brecq import BRECQ, DroppedStep, SoftRounding, batch_error, find_units, mixed
from qpipe_methods.reconstruction import Unit, float_parameter, quantized_layers, sensitivity
from qpipe_zoo.model.resnet_digits import ResNetDigits
from torch import Tensor, nn

import qpipe
from qpipe import QParams, Shelf, Task
from qpipe.nn import edge_quantizers
from qpipe.training import fake_quants

PLAIN: dict[str, Any] = {"activation": None, "target": "generic", "evaluator": [], "transform": []}
ASYMMETRIC = {"symmetric": False, "signed": False, "restricted": False}


class Block(nn.Module):
    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, hidden), nn.Linear(hidden, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Data(LightningDataModule):
    def __init__(self, batches: list[Tensor]) -> None:
        super().__init__()
        self.batches = batches

    def calibration_dataloader(self) -> list[Tensor]:
        return self.batches


def inputs(count: int = 3, width: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator)
    return [torch.randn(32, width, generator=generator) @ mixing for _ in range(count)]


def quantized(net: nn.Module, data: list[Tensor], **choices: Any) -> nn.Module:  # noqa: ANN401
    choices = {"weight": {"num_bits": 3}, **PLAIN, **choices}
    return qpipe.quantize(net, data, **choices)[0]


def fit(strategy: qpipe.FinetuneStrategy, model: nn.Module, data: list[Tensor]) -> None:
    strategy.fit(model, None, Data(data), Task(), SimpleNamespace(shelf=Shelf()), None)  # type: ignore[arg-type]


def gap(model: nn.Module, net: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return (model(torch.cat(data)) - net(torch.cat(data))).square().mean().item()


class TestBRECQ:
    def test_one_layer_without_fisher_is_adaround(self) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(nn.Linear(12, 5, bias=False)), inputs(1)
        ours, theirs = quantized(net, data), quantized(net, data)
        fit(BRECQ(iterations=300, step_lr=0, drop=0), ours, data)
        fit(AdaRound(iterations=300), theirs, data)
        assert torch.equal(ours[0].weight, theirs[0].weight)
        assert not torch.equal(ours[0].weight, quantized(net, data)[0].weight)  # not round-to-nearest

    @pytest.mark.parametrize("unit", ["layer", "block", "network"])
    def test_brings_the_network_closer_to_float(self, unit: str) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(Block(), nn.ReLU(), Block(), nn.Linear(12, 3)), inputs()
        model = quantized(net, data, activation={"num_bits": 5}, target="x86")
        before = gap(model, net, data)
        fit(BRECQ(unit=unit, iterations=120, lr=0.05, scale_lr=2e-3, drop=0), model, data)
        assert gap(model, net, data) < (1.0 if unit == "layer" else 0.9) * before
        assert all(f.learner is None and not list(f.parameters()) for f in fake_quants(model))
        if unit == "network":
            stored, shown = model[3]._parameters["weight"], model[3].weight
            assert torch.allclose(stored, shown, atol=1e-6)  # on its codes

    def test_keeps_what_it_cannot_better(self) -> None:
        torch.manual_seed(0)
        data = inputs()
        model = quantized(nn.Sequential(Block(), Block()), data)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fit(BRECQ(iterations=3, lr=100.0, drop=0), model, data)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("drop", [0.0, 0.5])
    def test_no_worse_than_rounding_to_nearest_on_any_block(self, drop: float) -> None:
        def gap_of(unit: Unit) -> float:
            pairs = zip(unit.calls, unit.targets, strict=True)
            return sum((unit.module(*args) - y).square().mean().item() for (args, _), y in pairs)

        class Measured(BRECQ):
            def _improve(self, model: nn.Module, unit: Unit, fisher: Any) -> None:  # noqa: ANN401
                nearest = gap_of(unit)
                super()._improve(model, unit, fisher)
                ratios[unit.name] = gap_of(unit) / nearest

        torch.manual_seed(0)
        ratios: dict[str, float] = {}
        data = [torch.rand(8, 1, 8, 8) for _ in range(3)]
        model = quantized(
            ResNetDigits(), data, transform=["fold_bn"], target="x86", activation={"num_bits": 4}
        )
        fit(Measured(iterations=30, lr=0.05, drop=drop), model, data)
        assert [*ratios] == ["stem.conv", "layer1", "layer2", "layer3", "fc"]
        assert max(ratios.values()) <= 1
        assert sum(ratio < 0.98 for ratio in ratios.values()) >= 3

    def test_starts_where_earlier_strategies_ended(self) -> None:
        torch.manual_seed(0)
        data = inputs()
        model = quantized(nn.Sequential(nn.Linear(12, 5)), data)
        floats = model[0]._parameters["weight"].detach().clone()
        fit(AdaRound(iterations=100), model, data)
        rounded = model[0].weight.clone()
        assert torch.equal(float_parameter(model, model[0], "weight"), floats)
        fit(BRECQ(iterations=0), model, data)
        assert torch.equal(model[0].weight, rounded)

    def test_fisher_weighs_each_output(self) -> None:
        unit = Unit("0", nn.Identity(), [((torch.tensor([[1.0, 2.0], [3.0, 5.0]]),), {})], [], [])
        unit = replace(unit, float_calls=unit.calls, targets=[torch.tensor([[1.0, 1.0], [1.0, 1.0]])])
        assert batch_error(unit, 0, None, 0.0).item() == (1 + 4 + 16) / 2
        assert batch_error(unit, 0, [torch.tensor([[0.5, 2.0]])], 0.0).item() == (0.5 * 4 + 2 * 17) / 2

    def test_fisher_runs(self) -> None:
        torch.manual_seed(3)
        net, data = nn.Sequential(Block(), Block(), nn.Linear(12, 1)), inputs()
        model = quantized(net, data)
        before = gap(model, net, data)
        fit(BRECQ(iterations=60, lr=0.05, fisher=True, drop=0), model, data)
        assert gap(model, net, data) < before

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="layer, block, network"):
            BRECQ(unit="stage")
        with pytest.raises(ValueError, match="drop=2"):
            BRECQ(drop=2)


class TestUnits:
    def test_blocks_are_what_occurs_more_than_once(self) -> None:
        data = [torch.rand(4, 1, 8, 8)]
        model = quantized(ResNetDigits(), data, transform=["fold_bn"], target="x86", activation={})
        assert [*find_units(model, "block").values()] == ["stem.conv", "layer1", "layer2", "layer3", "fc"]
        assert len(find_units(model, "layer")) == len(quantized_layers(model))
        assert [*find_units(model, "network")] == [model]

    def test_sensitivity_is_the_squared_derivative(self) -> None:
        data = inputs()
        net = nn.Sequential(Block(), nn.Linear(12, 1))
        model = quantized(net, data)
        found = sensitivity(model, Data(data), Task(), [model[0]], 96)[model[0]]
        expected = net[1].weight.detach().square()
        assert len(found) == 3
        assert torch.allclose(found[1], expected / expected.mean(), rtol=1e-4)


class TestLearners:
    def test_neighbours_are_the_code_and_the_one_towards_the_float_weight(self) -> None:
        slot = next(
            f for f in fake_quants(quantized(nn.Sequential(nn.Linear(2, 2)), [torch.rand(3, 2)]))
        ).slot
        one = QParams(torch.ones(1, 1), torch.zeros(1, 1))
        codes = torch.tensor([[1.0, 1.0, -2.0, 2.0, 0.0]])
        floats = torch.tensor([[1.4, 0.7, -1.2, 0.3, 0.2]])
        rounding = SoftRounding(slot, one, codes, floats)
        assert rounding.base.tolist() == [[1.0, 0.0, -2.0, 1.0, 0.0]]
        assert torch.allclose(rounding.h(), torch.tensor([[0.4, 0.7, 0.45, 0.55, 0.2]]), atol=1e-5)
        assert torch.equal(rounding.rounded(codes.shape), codes)
        assert rounding.v[0, 4].item() == pytest.approx(inverse_h(torch.tensor(0.2)).item(), rel=1e-4)

    def test_drop_leaves_a_share_of_the_elements(self) -> None:
        data = inputs()
        model = quantized(nn.Sequential(Block(), Block()), data, activation={"num_bits": 2}, target="x86")
        edge = edge_quantizers(model)[0]
        x = torch.randn(4000, 12)
        step = DroppedStep(edge.slot, edge.qparams(), 0.25).train()
        assert (step(x) == x).float().mean().item() == pytest.approx(0.25, abs=0.02)
        assert (step.eval()(x) == x).float().mean() < 0.01
        assert torch.equal(mixed(x, -x, 1.0), -x)


class TestAutoRoundByBlocks:
    def test_a_step_moves_offsets_against_the_sign_of_the_gradient(self) -> None:
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

    def test_a_block_errs_less_than_its_layers_one_by_one(self) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(Block(24), Block(24)), inputs()
        models = [quantized(net, data) for _ in range(3)]
        fit(AutoRound("layer", iterations=200), models[1], data)
        fit(AutoRound("block", iterations=200), models[2], data)
        nearest, by_layer, by_block = (gap(model, net, data) for model in models)
        assert by_block < 0.9 * by_layer < by_layer < nearest

    def test_ranges_of_a_block_are_learned_and_weights_lie_on_their_levels(self) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(Block(24), Block(24)), inputs()
        before, after = (quantized(net, data, weight={"num_bits": 3, **ASYMMETRIC}) for _ in range(2))
        fit(AutoRound("block", iterations=50), after, data)
        first: list[Any] = [model[0].first for model in (before, after)]  # type: ignore[index]
        assert (first[1].weight_quantizer.scale < first[0].weight_quantizer.scale).any()
        stored = first[1]._parameters["weight"].detach()
        torch.testing.assert_close(first[1].weight, stored)

    def test_the_ends_of_the_codes_move_with_the_range(self) -> None:
        net, data = nn.Sequential(nn.Linear(12, 6)), inputs(1)
        model = quantized(net, data, weight={"num_bits": 8, **ASYMMETRIC})
        quantizer: Any = model[0].weight_quantizer  # type: ignore[index]
        spec, weight = quantizer.slot.spec, net[0].weight.detach()
        offset = Offset(quantizer.slot, quantizer.qparams(), weight, ranges=True)
        learned = offset.qparams()
        ends = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        for i, code in enumerate((spec.quant_min, spec.quant_max)):
            value = (learned.scale * (code - learned.zero_point)).sum()
            (slope,) = torch.autograd.grad(value, offset.shrink, retain_graph=True)
            expected = torch.stack([ends[j] if i == j else torch.zeros_like(ends[j]) for j in range(2)])
            torch.testing.assert_close(
                slope, expected, atol=0.01, rtol=0
            )  # a zero point is rounded: half a code

    @pytest.mark.parametrize("clipped", [False, True])
    def test_a_range_starts_at_the_ends_of_the_weights_and_a_clipped_one_where_it_was(
        self, clipped: bool
    ) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(nn.Linear(12, 6)), inputs(1)
        model = quantized(net, data, weight={"num_bits": 3, **ASYMMETRIC})
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

    def test_every_batch_is_seen_before_one_comes_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_steps_that_only_harm_are_undone(self) -> None:
        torch.manual_seed(0)
        net, data = nn.Sequential(Block(24), Block(24)), inputs()
        model = quantized(net, data)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fit(AutoRound("block", iterations=1, lr=9.0), model, data)
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(ValueError, match="unit is layer or block, not 'network'"):
            AutoRound("network")
        with pytest.raises(ValueError, match="match=float is a layer's aim"):
            AutoRound("block", match="float")

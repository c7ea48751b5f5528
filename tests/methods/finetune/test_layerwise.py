from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qpipe_methods import quadratic
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.finetune.adaround import AdaRound, Rounding, inverse_h, regularizer
from qpipe_methods.finetune.autoround import AutoRound
from qpipe_methods.finetune.bias_correction import BiasCorrection
from qpipe_methods.finetune.gptq import GPTQ, Compensation, descended
from qpipe_methods.finetune.seqmse import SequentialMSE
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_methods.quadratic import Goal, Levels, fall_back, goal_of, rows_of
from qpipe_methods.reconstruction import Layer, parameter, reconstruct
from torch import Tensor, nn

import qpipe
from qpipe import Granularity, QParams, QpipeError, RecipeError, Shelf, Task
from qpipe.cache import Store
from qpipe.nn import disabled, weight_quantizers

RECIPE = SimpleNamespace(shelf=Shelf())  # all that a strategy reads of a recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x + self.project(self.depthwise(x).relu())
        return self.fc(x.mean((2, 3)))


def batches(n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(n)]


def prepared(**choices: object) -> nn.Module:
    torch.manual_seed(0)
    choices = {"weight": {"num_bits": 3}, "activation": None, "target": "generic", "evaluator": [], **choices}
    return qpipe.quantize(Net(), batches(), **choices)[0]


def walked(model: nn.Module) -> list[Layer]:
    layers: list[Layer] = []
    data = qpipe_data()
    reconstruct(model, data, Task(), layers.append, num_samples=32)
    return layers


def qpipe_data() -> object:
    from pytorch_lightning import LightningDataModule

    class Data(LightningDataModule):
        def calibration_dataloader(self) -> list[Tensor]:
            return batches()

    return Data()


def float_output(layer: Layer, x: Tensor) -> Tensor:
    layer.fake_quant.enabled = False
    try:
        y: Tensor = layer.module(x)
        return y
    finally:
        layer.fake_quant.enabled = True


def single(values: Tensor, x: Tensor, **choices: object) -> tuple[Layer, Levels]:
    """Return a prepared linear layer without a bias."""
    net = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    with torch.no_grad():
        net[0].weight.copy_(values)
    choices = {"weight": {"num_bits": 3}, "activation": None, "target": "generic", "evaluator": [], **choices}
    model = qpipe.quantize(net, [x], **choices)[0]
    (quantized,) = weight_quantizers(model)
    layer = Layer("0", quantized.module, quantized.fake_quant, [x], [x @ values.T])
    return layer, Levels(layer)


class TestWalk:
    def test_feeds_each_layer_what_the_quantized_model_gives(self) -> None:
        model = prepared()
        for layer in walked(model):
            hooked: list[Tensor] = []
            handle = layer.module.register_forward_pre_hook(lambda _, args, into=hooked: into.append(args[0]))
            with torch.no_grad():
                model(batches()[2])
            handle.remove()
            assert torch.equal(layer.inputs[2], hooked[0])

    def test_targets_are_the_float_model_though_layers_change_on_the_way(self) -> None:
        model, expected = prepared(), {}
        handles = [
            layer.register_forward_hook(lambda m, _, y: expected.setdefault(m, y))
            for layer in (model.conv, model.depthwise, model.project, model.fc)
        ]
        with disabled(model), torch.no_grad():
            model(batches()[1])
        for handle in handles:
            handle.remove()

        def spoil(layer: Layer) -> None:
            assert torch.equal(layer.targets[1], expected[layer.module])
            layer.weight.mul_(0.5)

        reconstruct(model, qpipe_data(), Task(), spoil)

    def test_a_second_strategy_aims_at_the_same_float_model(self) -> None:
        model = prepared()
        expected = [layer.targets[0] for layer in walked(model)]
        GPTQ().fit(model, None, qpipe_data(), Task(), RECIPE, None)  # type: ignore[arg-type]
        weight = model.conv.weight.clone()
        found = [layer.targets[0] for layer in walked(model)]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert torch.equal(model.conv.weight, weight)

    def test_names_layers_in_order(self) -> None:
        assert [layer.name for layer in walked(prepared())] == ["conv", "depthwise", "project", "fc"]

    def test_reads_fewer_batches_where_memory_is_short(self, caplog: pytest.LogCaptureFixture) -> None:
        layers: list[Layer] = []
        one = 6 * 8 * 3 * 12 * 12 * 4 / 2**30  # the largest activation is the input
        reconstruct(prepared(), qpipe_data(), Task(), layers.append, memory_gb=2.5 * one)
        assert len(layers[0].inputs) == 2
        assert "2 of 4 batches" in caplog.text

    def test_refuses_less_memory_than_a_batch_needs(self) -> None:
        with pytest.raises(RecipeError, match="memory_gb"):
            reconstruct(prepared(), qpipe_data(), Task(), lambda _: None, memory_gb=1e-9)

    def test_an_error_in_the_model_surfaces(self) -> None:
        model = prepared()
        model.fc.forward = lambda x: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            walked(model)

    def test_parameter_that_is_missing(self) -> None:
        with pytest.raises(QpipeError, match="no parameter 'bias'"):
            parameter(nn.Linear(2, 2, bias=False), "bias")


class TestGoal:
    @pytest.mark.parametrize("name", ["conv", "depthwise", "project", "fc"])
    def test_error_is_that_of_the_layer_with_the_best_bias(self, name: str) -> None:
        layer = next(la for la in walked(prepared()) if la.name == name)
        levels, goal = Levels(layer), goal_of(layer)
        with torch.no_grad():  # the module shows the rounded weight
            gaps = torch.cat([layer.module(x) - float_output(layer, x) for x in layer.inputs])
        gaps = gaps.transpose(0, 1).flatten(1) if gaps.dim() > 2 else gaps.T
        error = goal.error(levels.round(goal.aim))
        assert torch.allclose(error.flatten().float(), gaps.var(1, correction=0), rtol=1e-4)

    def test_strided_padded_dilated_convolutions(self) -> None:
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        x = torch.randn(64, 4, 9, 9)
        other = copy.deepcopy(conv)
        nn.init.normal_(other.weight)
        with torch.no_grad():
            y, gaps = conv(x), (other(x) - conv(x)).transpose(0, 1).flatten(1)
        goal = goal_of(Layer("c", conv, None, [x], [y]))  # type: ignore[arg-type]
        error = goal.error(rows_of(other, other.weight.detach()))
        assert torch.allclose(error.flatten().float(), gaps.var(1, correction=0), rtol=1e-4)

    def test_matching_the_float_outputs_aims_at_least_squares(self) -> None:
        torch.manual_seed(0)
        weight, x = torch.randn(3, 6), torch.randn(50, 6)
        layer, _levels = single(weight, x)
        layer.targets[0] = y = torch.randn(50, 3)  # type: ignore[index]
        assert torch.equal(goal_of(layer).aim[0].float(), weight)
        aim = goal_of(layer, "float", ridge=1e-7).aim[0].float()
        assert torch.allclose(aim, torch.linalg.lstsq(x, y).solution.T, atol=1e-4)
        held = goal_of(layer, "float", ridge=1e7).aim[0].float()
        assert torch.allclose(held, weight, atol=1e-4)

    @pytest.mark.parametrize("strategy", [GPTQ(), GPTQ(match="float"), AdaRound(iterations=60)])
    def test_large_matrices_are_kept_in_single_precision(
        self, strategy: LayerwiseStrategy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = []
        for precise, dtype in ((8 * 16**2, torch.float64), (8 * 16**2 - 1, torch.float32)):
            monkeypatch.setattr(quadratic, "_PRECISE", precise)
            torch.manual_seed(3)
            layer, _levels = single(torch.randn(8, 16), torch.randn(64, 16) @ torch.randn(16, 16))
            goal = goal_of(layer)
            goal = replace(goal, aim=goal.aim.clone())
            assert goal.xx.dtype == dtype
            strategy.improve(layer)
            errors.append(goal.error(rows_of(layer.module, layer.weight)).sum().item())
        assert errors[1] == pytest.approx(errors[0], rel=0.02)


class Reversed(PerSubchannel):
    """Every other row from its end: blocks that form no grid."""

    def to_blocks(self, x: Tensor) -> Tensor:
        return super().to_blocks(torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(x)]))

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        rows = super().from_blocks(blocks, shape)
        return torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(rows)])


class TestLevels:
    @pytest.mark.parametrize(
        "granularity", [PerSubchannel(8), PerSubchannel(7, pad=True), Reversed(8), PerChannel(), PerLayer()]
    )
    def test_a_column_has_the_parameters_of_the_blocks_its_elements_are_in(
        self, granularity: Granularity
    ) -> None:
        torch.manual_seed(0)
        layer, _ = single(torch.randn(4, 24), torch.randn(9, 24))
        layer.fake_quant.slot = replace(layer.fake_quant.slot, granularity=granularity)
        scale = torch.rand(len(granularity.to_blocks(layer.weight)), 1) + 0.1
        layer.fake_quant.set_qparams(QParams(scale, torch.zeros_like(scale)))
        levels, order = Levels(layer), torch.randperm(24)[None]
        each = [*levels.columns(order)]
        found = torch.stack([qparams.scale.flatten() for qparams in each], 1)
        assert torch.equal(found, levels.per_element()[0][0][:, order[0]])
        weight = layer.weight[:, order[0]].T
        rounded = [levels.round_column(x[None], qparams) for x, qparams in zip(weight, each, strict=True)]
        assert torch.equal(torch.stack(rounded, 2), levels.round(levels.rows(layer.weight))[:, :, order[0]])


class TestGPTQ:
    def test_a_diagonal_hessian_gives_round_to_nearest(self) -> None:
        layer, levels = single(torch.randn(4, 16), torch.randn(8, 16))
        weight = levels.rows(layer.weight).double()
        hessian = torch.diag(torch.rand(16).double() + 0.1)[None]
        assert torch.equal(Compensation(weight, hessian).rounded(levels), levels.round(weight))

    def test_full_shrinkage_is_round_to_nearest(self) -> None:
        torch.manual_seed(3)
        layer, levels = single(torch.randn(4, 16), torch.randn(64, 16) @ torch.randn(16, 16))
        nearest = levels.round(levels.rows(layer.weight))
        GPTQ(shrinkage=1.0).improve(layer)
        assert torch.equal(levels.rows(layer.weight), nearest)

    def test_the_second_of_two_columns_moves_by_h21_over_h22(self) -> None:
        weight = torch.tensor([[0.30, 1.0]])
        layer, levels = single(weight, torch.randn(8, 2))  # 3 bits: scale 1/3
        hessian = torch.tensor([[[2.0, 0.9], [0.9, 1.0]]]).double()
        row = levels.rows(layer.weight).double()
        found = Compensation(row, hessian, act_order=True).rounded(levels)
        moved = 1.0 + (0.30 - 1 / 3) * 0.9 / 1.0
        assert found[0, 0, 0].item() == pytest.approx(1 / 3)
        assert found[0, 0, 1].item() == pytest.approx(round(moved * 3) / 3)
        far = torch.tensor([[[2.0, 9.0], [9.0, 41.0]]]).double()  # act_order: the second column first
        found = Compensation(row, far, act_order=False).rounded(levels)
        assert found[0, 0, 1].item() == pytest.approx(
            max(-1, min(1, round((1 + (0.3 - 1 / 3) * 9 / 41) * 3) / 3))
        )

    def test_blocks_change_nothing(self) -> None:
        torch.manual_seed(3)
        x = torch.randn(64, 24) @ torch.randn(24, 24)
        layer, levels = single(torch.randn(6, 24), x)
        goal = goal_of(layer)
        compensation = Compensation(goal.aim.double(), goal.xx.double(), 0.01)
        assert torch.equal(compensation.rounded(levels, 24), compensation.rounded(levels, 5))

    @pytest.mark.parametrize("act_order", [True, False])
    def test_judges_by_the_hessian_it_was_given_though_that_is_overwritten(self, act_order: bool) -> None:
        torch.manual_seed(3)
        x = torch.randn(64, 150) @ torch.randn(150, 150)
        x[:, 7] = 0  # an input never seen
        layer, levels = single(torch.randn(200, 150), x)
        goal = goal_of(layer)
        compensation = Compensation(goal.aim, goal.xx.clone(), 0.01, act_order)
        nearest = levels.round(goal.aim)
        assert torch.allclose(compensation.error(nearest), goal.error(nearest), rtol=1e-3)

    def test_names_what_to_raise_where_inputs_depend_on_each_other(self) -> None:
        x = torch.randn(8, 1).expand(8, 16)
        layer, _levels = single(torch.randn(4, 16), x)
        with pytest.raises(RecipeError, match="damping"):
            GPTQ(damping=0.0).improve(layer)

    @pytest.mark.parametrize("granularity", ["channel", "layer", {"name": "subchannel", "group_size": 8}])
    def test_beats_rounding_on_correlated_inputs(self, granularity: object) -> None:
        torch.manual_seed(3)
        x = torch.randn(200, 24) @ torch.randn(24, 24)
        layer, levels = single(torch.randn(6, 24), x, granularity=granularity)
        goal = goal_of(layer)
        rounded = Compensation(goal.aim, goal.xx.clone(), 0.01).rounded(levels)
        assert torch.equal(levels.round(rounded), rounded)  # on the levels
        nearest = goal.error(levels.round(goal.aim)).sum()
        assert goal.error(rounded).sum() < 0.7 * nearest
        assert goal.error(descended(rounded, goal, levels)).sum() <= goal.error(rounded).sum()

    def test_descent_ends_where_no_single_change_helps(self) -> None:
        torch.manual_seed(5)
        layer, levels = single(
            torch.randn(2, 5), torch.randn(40, 5) @ torch.randn(5, 5), weight={"num_bits": 2}
        )
        goal = goal_of(layer)
        rounded = levels.round(goal.aim)
        for _ in range(10):
            rounded = descended(rounded, goal, levels)
        scale = layer.fake_quant.scale
        for row, column, step in itertools.product(range(2), range(5), (-1, 1)):
            other = rounded.clone()
            other[0, row, column] += step * scale[row, 0]
            error = goal.error(levels.round(other))[0, row]
            assert error >= goal.error(rounded)[0, row] * (1 - 1e-5)

    def test_takes_the_better_output(self) -> None:
        good, bad = torch.eye(2)[None], torch.zeros(1, 2, 2)
        goal = Goal(good, torch.eye(2)[None], torch.zeros(1, 2), torch.zeros(1, 2))
        mixed = torch.stack([good[0, 0], bad[0, 1]])[None]
        other = torch.stack([bad[0, 0], good[0, 1]])[None]
        fall_back(mixed, other, goal.error)
        assert torch.equal(mixed, good)


class TestStrategies:
    @pytest.mark.parametrize(
        "strategy",
        [
            GPTQ(),
            GPTQ(match="float", sweeps=2),
            AdaRound(iterations=100),
            AutoRound(iterations=50),
            AutoRound(iterations=50, ranges=False, match="float"),
            SequentialMSE(steps=10),
            BiasCorrection(),
        ],
        ids=lambda s: s.name,
    )
    def test_brings_the_network_closer_to_float(self, strategy: qpipe.FinetuneStrategy) -> None:
        model = prepared()
        x = torch.cat(batches())
        with torch.no_grad(), disabled(model):
            reference = model(x)
        with torch.no_grad():
            before = (model(x) - reference).square().mean()
        strategy.fit(model, None, qpipe_data(), Task(), RECIPE, None)  # type: ignore[arg-type]
        with torch.no_grad():
            assert (model(x) - reference).square().mean() < before

    @pytest.mark.parametrize(
        "strategy",
        [
            GPTQ(),
            GPTQ(sweeps=1),
            AdaRound(iterations=60),
            AutoRound(iterations=30),
            AutoRound(iterations=30, ranges=False),
            SequentialMSE(steps=6),
        ],
        ids=lambda s: f"{s.name} {vars(s).get('sweeps', '')}{vars(s).get('ranges', '')}",
    )
    @pytest.mark.parametrize("bits", [2, 4])
    def test_no_worse_than_rounding_to_nearest_on_any_layer(
        self, strategy: LayerwiseStrategy, bits: int
    ) -> None:
        layers = walked(prepared(weight={"num_bits": bits}))
        assert len(layers) == 4
        gained = 0
        for layer in layers:
            levels, goal = Levels(layer), goal_of(layer)
            goal = replace(goal, aim=goal.aim.clone())
            nearest = goal.error(levels.round(goal.aim)).sum()
            strategy.improve(layer)
            error = goal.error(levels.rows(layer.module.weight.detach())).sum()
            assert error <= nearest * (1 + 1e-5)
            gained += int(error < 0.999 * nearest)
        assert gained

    def test_bias_correction_leaves_no_mean_error(self) -> None:
        model = prepared()
        with torch.no_grad(), disabled(model):
            reference = model(torch.cat(batches())).mean(0)
        BiasCorrection().fit(model, None, qpipe_data(), Task(), RECIPE, None)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.allclose(model(torch.cat(batches())).mean(0), reference, atol=1e-5)

    def test_bias_correction_adds_a_bias_where_there_is_none(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4, bias=False))
        x = torch.rand(64, 3)
        model = qpipe.quantize(
            net,
            x,
            weight={"num_bits": 2},
            activation=None,
            target="generic",
            evaluator=[],
            finetune=["bias_correction"],
        )[0]
        with torch.no_grad():
            assert torch.allclose(model(x).mean(0), net(x).mean(0), atol=1e-6)

    def test_seqmse_finds_the_best_scale_by_brute_force(self) -> None:
        torch.manual_seed(2)
        x = torch.randn(100, 12) @ torch.randn(12, 12)
        weight = torch.randn(3, 12)
        layer, _ = single(weight, x, weight={"num_bits": 3, "calibrator": "minmax"})
        SequentialMSE(steps=8).improve(layer)
        for row in range(3):
            errors = {}
            for ratio in torch.linspace(0.3, 1, 8):
                scale = weight[row].abs().max() * ratio / 3
                rounded = (weight[row] / scale).round().clamp(-3, 3) * scale
                errors[scale.item()] = (x @ (rounded - weight[row])).square().sum().item()
            assert layer.fake_quant.scale[row].item() == pytest.approx(
                min(errors, key=errors.__getitem__), rel=1e-5
            )

    def test_autoround_moves_each_code_by_at_most_one(self) -> None:
        torch.manual_seed(2)
        weight, x = torch.randn(3, 12), torch.randn(100, 12) @ torch.randn(12, 12)
        layer, _levels = single(weight, x)
        AutoRound(iterations=40, ranges=False).improve(layer)
        codes = layer.weight / layer.fake_quant.scale
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert (codes.round() - (weight / layer.fake_quant.scale).round()).abs().max() == 1

    def test_autoround_rounds_down_or_up_though_farther_would_err_less(self) -> None:
        weight, x = torch.tensor([[0.4, 3.45]]), torch.randn(50, 1) * torch.tensor([1.0, 3.0])
        layer, _levels = single(weight, x)
        layer.fake_quant.set_qparams(
            QParams(torch.ones(1, 1), torch.zeros(1, 1))
        )  # the second is clipped at 3
        AutoRound(iterations=60, lr=0.1, ranges=False).improve(layer)
        assert layer.weight.tolist() == [[1.0, 3.0]]  # 2 would err less

    def test_autoround_shrinks_a_range_that_only_an_unused_weight_needs(self) -> None:
        torch.manual_seed(2)
        weight, x = torch.rand(3, 12) - 0.5, torch.randn(100, 12)
        weight[:, 0], x[:, 0] = 1.0, 0.0
        layer, _levels = single(weight, x)
        start = layer.fake_quant.scale.clone()
        AutoRound(iterations=100).improve(layer)
        assert (layer.fake_quant.scale < 0.8 * start).all()

    @pytest.mark.parametrize(
        "strategy",
        [
            GPTQ(match="float", ridge=1e-6),
            AdaRound(iterations=60, match="float", ridge=1e-6),
            AutoRound(iterations=30, match="float", ridge=1e-6),
        ],
        ids=lambda s: s.name,
    )
    def test_matching_the_float_outputs_ends_at_least_squares(self, strategy: LayerwiseStrategy) -> None:
        torch.manual_seed(2)
        weight, x = torch.randn(3, 12), torch.randn(100, 12)
        layer, _levels = single(weight, x, weight={"num_bits": 8})
        layer.inputs[0] = x + 0.5 * torch.randn(100, 12)  # type: ignore[index]  # earlier errors
        best = torch.linalg.lstsq(layer.inputs[0], x @ weight.T).solution.T
        strategy.improve(layer)
        gap, least, held = (
            (layer.inputs[0] @ w.T - x @ weight.T).square().sum() for w in (layer.weight, best, weight)
        )
        assert gap < 1.01 * least < 0.9 * held

    def test_adaround_ends_at_floor_or_ceiling(self) -> None:
        torch.manual_seed(2)
        weight, x = torch.randn(3, 12), torch.randn(100, 12) @ torch.randn(12, 12)
        layer, _levels = single(weight, x)
        AdaRound(iterations=200).improve(layer)
        up = (layer.weight / layer.fake_quant.scale).round() - (weight / layer.fake_quant.scale).floor()
        assert set(up.unique().tolist()) <= {0.0, 1.0}

    def test_refuses_an_unknown_match(self) -> None:
        for strategy in (AdaRound, AutoRound, GPTQ):
            with pytest.raises(ValueError, match="layer or float"):
                strategy(match="x")


class TestAdaRoundEquations:
    def test_starts_at_the_float_weight(self) -> None:
        weight = torch.randn(3, 12)
        _layer, levels = single(weight, torch.randn(4, 12))
        rounding = Rounding(levels.rows(weight), levels)
        assert torch.allclose(rounding.weight(rounding.h())[0], weight, atol=2e-3)

    def test_v_of_three_tenths_is_minus_log_two(self) -> None:
        assert inverse_h(torch.tensor(0.3)).item() == pytest.approx(-math.log(2))  # METHODS.md D

    def test_regularizer_is_zero_for_choices_alone(self) -> None:
        assert regularizer(torch.tensor([0.0, 1.0]), 2.0) == 0
        assert regularizer(torch.tensor([0.5, 0.0]), 2.0) == 1

    @pytest.mark.parametrize("strength", [0.0, 0.7])
    def test_gradient_is_that_of_the_loss(self, strength: float) -> None:
        torch.manual_seed(4)
        weight, x = torch.randn(3, 12), torch.randn(30, 12)
        _layer, levels = single(weight, x, weight={"num_bits": 2})
        rounding = Rounding(1.3 * levels.rows(weight), levels)  # some of it beyond the last code
        aim, xx = levels.rows(weight), x.T @ x
        v = rounding.v.clone().requires_grad_()
        h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
        gap = rounding.weight(h) - aim
        loss = ((gap @ xx) * gap).sum() + strength * regularizer(h, 3.0)
        (expected,) = torch.autograd.grad(loss, v)
        assert torch.allclose(rounding.gradient(aim, xx, strength, 3.0), expected, rtol=1e-4, atol=1e-4)


class TestResume:
    def test_a_killed_reconstruction_goes_on_where_it_was(self, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        whole, parts = prepared(), prepared()
        GPTQ(match="float").fit(whole, None, qpipe_data(), Task(), RECIPE, None)  # type: ignore[arg-type]
        shelf, improved = Shelf(Store(tmp_path)), []
        strategy = GPTQ(match="float")

        def until(last: str) -> Callable[[Layer], None]:
            def improve(layer: Layer) -> None:
                if layer.name == last:
                    raise Killed
                improved.append(layer.name)
                strategy.improve(layer)

            return improve

        with pytest.raises(Killed):
            reconstruct(parts, qpipe_data(), Task(), until("project"), shelf=shelf)
        again = prepared()
        reconstruct(again, qpipe_data(), Task(), until(""), shelf=shelf)
        assert improved == ["conv", "depthwise", "project", "fc"]  # none of them twice
        for key, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[key])

    def test_a_bias_that_was_added_is_restored(self, tmp_path: Path) -> None:
        shelf = Shelf(Store(tmp_path))

        def add(layer: Layer) -> None:
            layer.module._parameters["bias"] = nn.Parameter(torch.arange(4.0))

        net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
        for improve in (add, lambda _: None):
            model = qpipe.quantize(net, batches(), evaluator=[])[0]
            reconstruct(model, qpipe_data(), Task(), improve, shelf=shelf)
            assert model[0].bias.tolist() == [0.0, 1.0, 2.0, 3.0]


class TestScales:
    @pytest.mark.parametrize("granularity", ["channel", "layer"])
    def test_gptq_takes_the_scale_it_errs_least_with(self, granularity: str) -> None:
        torch.manual_seed(3)
        weight, x = torch.randn(5, 24), torch.randn(300, 24) @ torch.randn(24, 24)
        ratios = torch.linspace(0.6, 1.1, 6).tolist()
        layer, levels = single(weight, x, granularity=granularity)
        goal, start = goal_of(layer), layer.fake_quant.scale.clone()
        goal = replace(goal, aim=goal.aim.clone())
        errors = []
        for ratio in [1.0, *ratios]:  # by hand: each scale on its own
            layer.fake_quant.set_qparams(QParams(start * ratio, layer.fake_quant.zero_point))
            rounded = Compensation(goal.aim, goal.xx.clone(), 0.01).rounded(levels)
            errors.append(goal.error(rounded)[0])
        table = torch.stack(errors)
        layer.fake_quant.set_qparams(QParams(start, layer.fake_quant.zero_point))
        GPTQ(scales=6).improve(layer)
        found = goal.error(levels.rows(layer.weight))[0]
        best = table.amin(0) if granularity == "channel" else table[table.sum(1).argmin()]
        assert torch.allclose(found, best, rtol=1e-3)
        assert table[0].sum() > 1.1 * found.sum()


STRICT = [
    "adaround",
    "autoround",
    {"name": "autoround", "unit": "block"},
    "brecq",
    {"name": "gptq", "scales": 3},
]


@pytest.mark.parametrize("strategy", STRICT, ids=str)
def test_levels_that_are_not_even_are_refused_before_calibration(
    strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    monkeypatch.setattr("qpipe.pipeline.calibrate", lambda *_: passes.append("calibrate") or ())
    with pytest.raises(RecipeError, match="needs even steps; quantizer 'log' of '0:weight' has none: use"):
        qpipe.quantize(
            nn.Sequential(nn.Linear(8, 3)),
            torch.randn(9, 8),
            quantizer="log",
            finetune=[strategy],
            activation=None,
            target="generic",
            evaluator=[],
        )
    assert not passes

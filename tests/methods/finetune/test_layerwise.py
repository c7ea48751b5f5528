from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.finetune.adaround import AdaRound, Rounding, inverse_h, regularizer
from qpipe_methods.finetune.autoround import AutoRound
from qpipe_methods.finetune.bias_correction import BiasCorrection
from qpipe_methods.finetune.gptq import GPTQ, compensated, descended
from qpipe_methods.finetune.seqmse import SequentialMSE
from qpipe_methods.quadratic import Levels, Moments, moments, no_worse
from qpipe_methods.reconstruction import Layer, parameter, reconstruct
from torch import Tensor, nn

import qpipe
from qpipe import QParams, QpipeError, RecipeError, Shelf, Task
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


class TestMoments:
    @pytest.mark.parametrize("name", ["conv", "depthwise", "project", "fc"])
    def test_error_is_that_of_the_layer_with_the_best_bias(self, name: str) -> None:
        layer = next(la for la in walked(prepared()) if la.name == name)
        levels = Levels(layer)
        rounded = levels.round(levels.rows(layer.weight))
        with torch.no_grad():
            gaps = torch.cat(
                [t - layer.module.forward(x) for x, t in zip(layer.inputs, layer.targets, strict=True)]
            )
        gaps = gaps.transpose(0, 1).flatten(1) if gaps.dim() > 2 else gaps.T
        assert torch.allclose(
            moments(layer).error(rounded).flatten().float(), gaps.var(1, correction=0), rtol=1e-4
        )

    def test_strided_padded_dilated_convolutions(self) -> None:
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        x = torch.randn(3, 4, 9, 9)
        with torch.no_grad():
            y = conv(x)
        layer = Layer("c", conv, None, [x], [y])  # type: ignore[arg-type]
        rows = conv.weight.detach().reshape(2, 3, -1)
        assert moments(layer).error(rows).abs().max() < 1e-6

    def test_solution_is_least_squares(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        of = Moments((x.T @ x / 50)[None], (x.T @ y / 50)[None], y.square().mean(0)[None], zero, zero)
        found = of.solution(torch.randn(1, 3, 6), 1e-12)[0]
        assert torch.allclose(found, torch.linalg.lstsq(x, y).solution.T, atol=1e-6)


class TestGPTQ:
    def test_a_diagonal_hessian_gives_round_to_nearest(self) -> None:
        layer, levels = single(torch.randn(4, 16), torch.randn(8, 16))
        weight = levels.rows(layer.weight).double()
        hessian = torch.diag(torch.rand(16).double() + 0.1)[None]
        assert torch.equal(compensated(weight, hessian, levels), levels.round(weight))

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
        found = compensated(levels.rows(layer.weight).double(), hessian, levels, act_order=True)
        moved = 1.0 + (0.30 - 1 / 3) * 0.9 / 1.0
        assert found[0, 0, 0].item() == pytest.approx(1 / 3)
        assert found[0, 0, 1].item() == pytest.approx(round(moved * 3) / 3)
        far = torch.tensor([[[2.0, 9.0], [9.0, 41.0]]]).double()  # act_order: the second column first
        found = compensated(levels.rows(layer.weight).double(), far, levels, act_order=False)
        assert found[0, 0, 1].item() == pytest.approx(
            max(-1, min(1, round((1 + (0.3 - 1 / 3) * 9 / 41) * 3) / 3))
        )

    def test_blocks_change_nothing(self) -> None:
        torch.manual_seed(3)
        x = torch.randn(64, 24) @ torch.randn(24, 24)
        layer, levels = single(torch.randn(6, 24), x)
        weight, hessian = levels.rows(layer.weight).double(), moments(layer).damped(0.01)
        one = compensated(weight, hessian, levels, block_size=24)
        assert torch.equal(one, compensated(weight, hessian, levels, block_size=5))

    @pytest.mark.parametrize("granularity", ["channel", "layer", {"name": "subchannel", "group_size": 8}])
    def test_beats_rounding_on_correlated_inputs(self, granularity: object) -> None:
        torch.manual_seed(3)
        x = torch.randn(200, 24) @ torch.randn(24, 24)
        layer, levels = single(torch.randn(6, 24), x, granularity=granularity)
        weight, of = levels.rows(layer.weight).double(), moments(layer)
        rounded = compensated(weight, of.damped(0.01), levels)
        assert torch.equal(levels.round(rounded), rounded)  # on the levels
        nearest = of.error(levels.round(weight)).sum()
        assert of.error(rounded).sum() < 0.7 * nearest
        assert of.error(descended(rounded, of, levels)).sum() <= of.error(rounded).sum()

    def test_descent_ends_where_no_single_change_helps(self) -> None:
        torch.manual_seed(5)
        layer, levels = single(
            torch.randn(2, 5), torch.randn(40, 5) @ torch.randn(5, 5), weight={"num_bits": 2}
        )
        of, rounded = moments(layer), levels.round(levels.rows(layer.weight).double())
        for _ in range(10):
            rounded = descended(rounded, of, levels)
        scale = layer.fake_quant.scale
        for row, column, step in itertools.product(range(2), range(5), (-1, 1)):
            other = rounded.clone()
            moved = rounded[:, :, column] + step * scale.T
            other[0, row, column] = levels.round_column(moved, column)[0, row]
            assert of.error(other)[0, row] >= of.error(rounded)[0, row] - 1e-12

    def test_takes_the_better_output(self) -> None:
        x = torch.eye(2)
        of = Moments(x[None], x[None], torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        good, bad = torch.eye(2)[None], torch.zeros(1, 2, 2)
        mixed = torch.stack([good[0, 0], bad[0, 1]])[None]
        assert torch.equal(no_worse(mixed, good, of), good)


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
            levels, weight = Levels(layer), layer.weight.clone()
            goal = moments(layer).aimed_at(levels.rows(weight))
            nearest = goal.error(levels.round(levels.rows(weight))).sum()
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

    def test_refuses_levels_that_are_not_even(self) -> None:
        layer, _ = single(torch.randn(3, 8), torch.randn(9, 8), quantizer="log")
        for strategy in (AdaRound(), AutoRound()):
            with pytest.raises(RecipeError, match="'log'"):
                strategy.improve(layer)

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
        goal, start = moments(layer).aimed_at(levels.rows(weight)), layer.fake_quant.scale.clone()
        errors = []
        for ratio in [1.0, *ratios]:  # by hand: each scale on its own
            layer.fake_quant.set_qparams(QParams(start * ratio, layer.fake_quant.zero_point))
            rounded = compensated(levels.rows(weight).double(), goal.damped(0.01), levels)
            errors.append(goal.error(rounded)[0])
        table = torch.stack(errors)
        layer.fake_quant.set_qparams(QParams(start, layer.fake_quant.zero_point))
        GPTQ(scales=6).improve(layer)
        found = goal.error(levels.rows(layer.weight))[0]
        best = table.amin(0) if granularity == "channel" else table[table.sum(1).argmin()]
        assert torch.allclose(found, best.float().double(), rtol=1e-3)
        assert table[0].sum() > 1.1 * found.sum()

    def test_refuses_levels_that_are_not_even(self) -> None:
        layer, _ = single(torch.randn(3, 8), torch.randn(9, 8), quantizer="log")
        with pytest.raises(RecipeError, match="scales=0"):
            GPTQ(scales=3).improve(layer)

"""What quantizing one layer costs, found another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qpipe_methods.replay import Replay
from qpipe_methods.sensitivity import alone, candidates, mean_traces, measure
from torch import Tensor, nn

from qpipe import Recipe, Task
from qpipe.nn import disabled, edge_quantizers, weight_quantizers
from qpipe.stages.prepare import prepare


class Residual(nn.Module):
    """One ReLU called twice, one layer called twice, and a sum written into a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        z = self.second(y)
        z += y
        z = self.second(self.relu(z))
        z.mul_(0.5)
        return self.last(z)


def prepared(
    model: nn.Module, x: Tensor, make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None]
) -> nn.Module:
    prepare(model.eval(), [x], Task(), make_recipe())
    calibrate_on(model, x)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def residual(x: Tensor, make_recipe: Any, calibrate_on: Any) -> nn.Module:  # noqa: ANN401
    torch.manual_seed(0)
    return prepared(Residual(), x, make_recipe, calibrate_on)


def test_a_replay_ends_where_a_whole_run_ends(residual: nn.Module, x: Tensor) -> None:
    quantizers = [*edge_quantizers(residual), *(w.fake_quant for w in weight_quantizers(residual))]
    with disabled(residual):
        replay = Replay(residual, ((x,), {}))
        assert torch.equal(replay.output, residual(x))
    for quantizer in quantizers:
        with alone(residual, [quantizer]), torch.no_grad():
            whole = residual(x)
            assert torch.equal(replay.run([quantizer]), whole), quantizer.name
        assert quantizer.name == "last" or not torch.equal(whole, replay.output)


def test_a_replay_computes_only_what_lies_behind(residual: nn.Module, x: Tensor) -> None:
    calls: list[str] = []
    with disabled(residual):
        replay = Replay(residual, ((x,), {}))
    for name, weight in zip(("first", "second", "last"), weight_quantizers(residual), strict=True):
        calls.clear()
        weight.fake_quant.register_forward_pre_hook(lambda module, _: calls.append(module.name))
        with alone(residual, [weight.fake_quant]):
            replay.run([weight.fake_quant])
        assert f"{name}:weight" in calls
        assert "first:weight" not in calls[1:]
    calls.clear()
    with alone(residual, [weight.fake_quant]):
        replay.run([weight.fake_quant])
    assert calls == ["last:weight"]


def test_noise_is_that_of_a_model_rounded_by_hand(residual: nn.Module, x: Tensor) -> None:
    found = candidates(residual, [3, 8], lambda path: path == "last")
    costs = measure("sqnr", found, residual, [x[:10], x[10:]], Task(), 1)
    with disabled(residual), torch.no_grad():
        reference = residual(x)
        for each, own in zip(found, costs, strict=True):
            assert [choice.num_bits for choice in each.choices] == ([8] if each.path == "last" else [3, 8])
            for choice, cost in zip(each.choices, own, strict=True):
                twin = copy.deepcopy(residual)
                weight = twin.get_submodule(each.path)._parameters["weight"]
                top = 2 ** (choice.num_bits - 1) - 1
                scale = weight.abs().amax(1, keepdim=True) / top
                weight.copy_((weight / scale).round().clamp(-top, top) * scale)
                noise = (twin(x) - reference).norm() / reference.norm()
                assert cost == pytest.approx(noise.item() ** 2, rel=1e-4)


def test_kl_is_that_of_the_distributions(residual: nn.Module, x: Tensor) -> None:
    (each,) = [c for c in candidates(residual, [2], lambda _: False) if c.path == "last"]
    cost = measure("kl", [each], residual, [x], Task(), 1)[0][0]
    each.choices[0].put()
    with torch.no_grad():
        with disabled(residual):
            theirs = torch.distributions.Categorical(logits=residual(x).double())
        with alone(residual, each.fake_quants):
            mine = torch.distributions.Categorical(logits=residual(x).double())
    assert cost == pytest.approx(torch.distributions.kl_divergence(theirs, mine).mean().item(), rel=1e-5)
    assert cost > 0


def test_one_draw_gives_the_trace_of_a_diagonal_hessian(make_recipe: Any, calibrate_on: Any) -> None:  # noqa: ANN401
    x = torch.diag(
        torch.tensor([1.0, 2.0, 3.0, 4.0])
    )  # half the squared error: H = diag(x^2) / 4 for each row
    model = prepared(nn.Linear(4, 3), x, make_recipe, calibrate_on)
    for seed in range(3):
        (trace,) = mean_traces(weight_quantizers(model), model, [x], Task(None), draws=1, seed=seed)
        assert trace == pytest.approx((1 + 4 + 9 + 16) / 4 / 4, rel=1e-6)


def test_many_draws_give_the_trace_of_the_whole_hessian(residual: nn.Module, x: Tensor) -> None:
    weights = weight_quantizers(residual)
    traces = mean_traces(weights, residual, [x[:8], x[8:]], Task(), draws=800)
    last = residual.last
    with disabled(residual):
        seen: list[Tensor] = []
        last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
        p = residual(x).detach().double().softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # of KL, in the logits
    expected = (
        curvature.diagonal(dim1=1, dim2=2).sum(1) * seen[0].square().sum(1)
    ).mean() / last.weight.numel()
    assert traces[-1] == pytest.approx(expected.item(), rel=0.1)
    assert all(not p.grad_fn and p.requires_grad for p in residual.parameters())


def test_omega_is_twice_what_rounding_adds_to_a_loss_of_hessian_c_times_i(
    make_recipe: Any,  # noqa: ANN401
    calibrate_on: Any,  # noqa: ANN401
) -> None:
    torch.manual_seed(0)
    x = 1.5 * torch.eye(4)
    model = prepared(nn.Linear(4, 3), x, make_recipe, calibrate_on)
    found = candidates(model, [2, 3, 4], lambda _: False)
    for choice, omega in zip(
        found[0].choices, measure("hessian", found, model, [x], Task(None), draws=1)[0], strict=True
    ):
        with disabled(model):
            reference = model(x)
        choice.put()
        with alone(model, found[0].fake_quants):
            increase = (model(x) - reference).square().sum(1).mean() / 2
        assert omega == pytest.approx(2 * increase.item(), rel=1e-5)

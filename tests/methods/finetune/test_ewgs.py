from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.ewgs import EWGS, ScaledStep, hessian_over_gradient
from qpipe_methods.finetune.lsq import LearnedStep
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Role, Slot, Task
from qpipe.pipeline import quantize
from qpipe.training import fake_quants

SLOT = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
START = QParams(torch.full((1, 1), 0.5), torch.zeros(1, 1))


def gradients(step: LearnedStep, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([0.5 * 2.3, 0.5 * 2.3, 0.5 * -1.4, 0.5 * 9.0], requires_grad=True)
    (step(x) * upstream).sum().backward()
    assert x.grad is not None
    assert step.scale.grad is not None
    return x.grad, step.scale.grad


def test_gradients_are_equation_4() -> None:
    upstream = torch.tensor([2.0, -2.0, 1.0, 1.0])  # errors in steps: 0.3, 0.3, -0.4; clipped
    x, _ = gradients(ScaledStep(SLOT, START, 0.1), upstream)
    expected = [2 * (1 + 0.1 * 0.3), -2 * (1 - 0.1 * 0.3), 1 * (1 - 0.1 * 0.4), 0]
    assert x.tolist() == pytest.approx(expected, abs=1e-5)


def test_zero_strength_is_lsq_and_the_steps_gradient_always_is() -> None:
    upstream = torch.tensor([2.0, -2.0, 1.0, 1.0])
    plain, step = gradients(LearnedStep(SLOT, START), upstream)
    same, _ = gradients(ScaledStep(SLOT, START, 0.0), upstream)
    _, scaled_step = gradients(ScaledStep(SLOT, START, 0.5), upstream)
    assert torch.equal(plain, same)
    assert torch.equal(step, scaled_step)


def test_the_hessian_of_a_quadratic_loss_is_found_exactly() -> None:
    """Half Σ h x²: the mean diagonal is mean h, the gradient h x; signs find a diagonal in one draw."""
    h, x = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, -1.0, 1.0], requires_grad=True)
    y, unused = 2 * x, torch.ones(2, requires_grad=True)
    found = hessian_over_gradient(0.5 * (h * y.square()).sum(), [y, unused], 1)
    assert found[0].item() == pytest.approx(3 / (3 * (h * y.detach()).std().item()))
    assert found[1] == 0


def test_a_negative_curvature_has_no_strength() -> None:
    step = ScaledStep(SLOT, START, 0.4)
    step.take(torch.tensor(-2.0), 1.0)
    assert step.delta.item() == 0
    step.take(torch.tensor(0.6), 0.5)
    assert step.delta.item() == pytest.approx(0.5 * 0.6 * 0.5)  # half of the way, in units of the step


def test_hutchinsons_estimate_is_unbiased() -> None:
    """H = [[2, 5], [5, 4]]: a draw gives 6 ± 10, their mean 6."""
    torch.manual_seed(0)
    h, x = torch.tensor([[2.0, 5.0], [5.0, 4.0]]), torch.tensor([1.0, 0.2], requires_grad=True)
    y = x.clone()
    (found,) = hessian_over_gradient(0.5 * y @ h @ y, [y], 2000)
    assert found.item() * 3 * (h @ x).std().item() == pytest.approx(3, abs=0.35)  # 3 sd of the mean


class Squares(Task):
    def loss(self, output: torch.Tensor, batch: Any) -> torch.Tensor:  # noqa: ANN401
        return 0.5 * (output - batch[1]).square().sum()


class Look(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def _learner(self, module: LightningModule) -> ScaledStep:
        learner = fake_quants(module)[0].learner
        assert isinstance(learner, ScaledStep)
        return learner

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:  # noqa: ANN401
        learner, weight = self._learner(pl_module), pl_module.model._parameters["weight"].detach()
        self.start = (learner.scale.detach().clone(), learner.eval()(weight).detach())
        learner.train()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:  # noqa: ANN401
        self.seen.append((*self.start, self._learner(pl_module).delta.item()))


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
def test_strengths_are_measured_as_training_goes(every: int, measured: list[int]) -> None:
    """One linear layer on inputs 3 I: the Hessian by a weight is 9, δ = 9 s / (3 sd g)."""
    torch.manual_seed(0)
    model, look = torch.nn.Linear(3, 2, bias=False), Look()
    words = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=4, callbacks=[look], enable_model_summary=False, **words)
    target = torch.randn(3, 2)
    quantize(
        model,
        [(3 * torch.eye(3), target)],
        task=Squares(),
        trainer=trainer,
        activation=None,
        finetune=[{"name": "ewgs", "every": every, "lr": 0.05}],
        evaluator=[],
        weight={"num_bits": 3},
        granularity="layer",
    )
    assert len(look.seen) == 4
    deltas = [delta for _, _, delta in look.seen]
    for i in measured:
        scale, rounded, delta = look.seen[i]
        gradient = 3 * (3 * rounded.T - target).T
        assert delta == pytest.approx(9 * scale.item() / (3 * gradient.std().item()), rel=1e-4)
    assert all(deltas[i] == deltas[i - 1] for i in range(4) if i not in measured)


def test_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        EWGS(delta=-1)
    with pytest.raises(ValueError, match="less than one epoch"):
        EWGS(every=0)

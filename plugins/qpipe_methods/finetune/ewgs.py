"""Scale gradients by the rounding error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, QParams, RecipeError, Slot, Task, hookimpl
from qpipe.nn import FakeQuant
from qpipe.training import Training, fake_quants, listening, trains_itself
from qpipe_methods.finetune.lsq import LSQ, LearnedStep

if TYPE_CHECKING:
    from qpipe import Recipe, Reference

_BATCHES, _PROBES = 3, 4  # measured at a time, as the authors' code does; random vectors for each


class EWGS(LSQ):
    """Train as LSQ does, the gradient of x enlarged where it would move x away from its level.

    Args:
        init: of the steps, see LSQ.
        delta: strength, for x in units of its step; None: for each tensor the mean diagonal of the loss's
            Hessian over three deviations of its gradient, both by the rounded tensor.
        every: epochs between measurements of the Hessian, on three batches.
        training: see TrainingStrategy.

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling", 2021, arXiv 2104.00903,
    eq. 4 and section 3.3; G = 3 sd(g) is the authors' code's.
    Equation: g_x = g_q (1 + δ sign(g_q) (x - q)); δ = max(Tr(H) / N, 0) / G
    """

    name = "ewgs"

    def __init__(
        self,
        init: Literal["lsq", "calibrated"] = "lsq",
        delta: float | None = None,
        every: int = 10,
        **training: Unpack[Training],
    ) -> None:
        if delta is not None and delta < 0:
            raise ValueError(f"delta={delta} is negative")
        if every < 1:
            raise ValueError(f"every={every} is less than one epoch")
        super().__init__(init, **training)
        self.delta = delta
        self.every = every

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when the model's own training step hides the loss, or as LSQ does."""
        super().check(model, data, task, recipe)
        if self.delta is None and trains_itself(model):
            raise RecipeError(
                f"{type(model).__name__} has its own training_step, whose Hessian ewgs does not see; "
                "give finetune.ewgs.delta=0.001"
            )

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step with scaled gradients where codes have a step."""
        slot = fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            return None
        return ScaledStep(slot, fake_quant.qparams(), self.delta or 0.0)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Train model in place, measuring the Hessian on the way where no strength is given."""
        if self.delta is not None:
            super().fit(model, reference, data, task, recipe, trainer)
            return

        def loss(batch: Any) -> Tensor:  # noqa: ANN401
            return self.distillation.loss(model, model, reference.model, task, batch)

        with listening(trainer, _Measuring(model, loss, self.every)):
            super().fit(model, reference, data, task, recipe, trainer)


class ScaledStep(LearnedStep):
    """Fake-quantize with a learned step; see EWGS.

    Args:
        delta: strength.
    """

    delta: Tensor

    def __init__(self, slot: Slot, start: QParams, delta: float) -> None:
        super().__init__(slot, start)
        self.register_buffer("delta", torch.full((1,), delta))
        self.measuring = False
        self.rounded: Tensor | None = None  # of the last forward, while the Hessian is measured

    def forward(self, x: Tensor) -> Tensor:
        """Round x."""
        if self.measuring:
            self.rounded = super().forward(x)
            return self.rounded
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        scaled: Tensor = _Elementwise.apply(x, self._error(x), self.delta)  # type: ignore[no-untyped-call]
        return super().forward(scaled)

    def _error(self, x: Tensor) -> Tensor:
        """Return x - q in steps."""
        with torch.no_grad():
            granularity = self.slot.granularity
            difference = x - super().forward(x)
            return granularity.from_blocks(granularity.to_blocks(difference) / self.scale, x.shape)

    def take(self, strength: Tensor, share: float) -> None:
        """Move towards a strength for x in its own units, by a share of the way."""
        self.delta.lerp_(strength.clamp(min=0) * self.scale.detach().mean(), share)


class _Measuring(Callback):
    """Measure the Hessian on the first batches of every so many epochs."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], every: int) -> None:
        self.model = model
        self.loss = loss
        self.every = every

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Set the strengths to their mean over the batches so far."""
        if trainer.current_epoch % self.every or batch_idx >= _BATCHES:
            return
        steps = [f.learner for f in fake_quants(self.model) if isinstance(f.learner, ScaledStep)]
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            for step in steps:
                step.measuring = True
            loss = self.loss(batch)
        finally:
            for step in steps:
                step.measuring = False
        reached = [(step, step.rounded) for step in steps if step.rounded is not None]
        strengths = hessian_over_gradient(loss, [rounded for _, rounded in reached], _PROBES)
        with torch.no_grad():
            for buffer, value in before:  # batch norm counted this batch
                buffer.copy_(value)
            for (step, _), strength in zip(reached, strengths, strict=True):
                step.take(strength, 1 / (batch_idx + 1))
                step.rounded = None


def hessian_over_gradient(loss: Tensor, tensors: list[Tensor], probes: int) -> list[Tensor]:
    """Return for each tensor the mean diagonal of the loss's Hessian over three deviations of its gradient.

    By Hutchinson's estimate, E[v' H v] = Tr H for signs v drawn at random.
    """
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    found = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is None or not gradient.requires_grad:
            found.append(tensor.new_zeros(()))
            continue
        trace = torch.stack([_probe(gradient, tensor) for _ in range(probes)]).mean()
        deviation = gradient.detach().std().clamp(min=torch.finfo(tensor.dtype).tiny)
        found.append(trace / tensor.numel() / (3 * deviation))
    return found


def _probe(gradient: Tensor, tensor: Tensor) -> Tensor:
    v = torch.empty_like(tensor).bernoulli_(0.5).mul_(2).sub_(1)
    (product,) = torch.autograd.grad(gradient, tensor, v, retain_graph=True, allow_unused=True)
    return tensor.new_zeros(()) if product is None else (v * product).sum()


class _Elementwise(torch.autograd.Function):
    """Return x; its gradient g becomes g (1 + delta sign(g) error)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Tensor, delta: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(error, delta)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        error, delta = ctx.saved_tensors
        return grads[0] * (1 + delta * grads[0].sign() * error), None, None


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer element-wise gradient scaling."""
    return [EWGS]

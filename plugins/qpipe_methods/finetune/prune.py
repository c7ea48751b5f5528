"""Prune while training with quantizers in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, RecipeError, Task, hookimpl
from qpipe.nn import FakeQuant, QuantizedWeight, weight_quantizers
from qpipe.training import Training, listening
from qpipe_methods.finetune.lsq import LSQ
from qpipe_methods.pruning import PRUNED, check_budget, check_divides, largest_of_each, largest_share

if TYPE_CHECKING:
    from qpipe import Recipe, Reference


class Prune(LSQ):
    """Mask the smallest weights of each layer before they are quantized, more and more of them.

    By share, masks follow the cubic schedule and masked weights rest. With n of every m inputs, masks are
    taken anew at each step and masked weights go on learning (SR-STE); a layer whose inputs m does not
    divide is left as it is. Quantized linear and convolution layers are pruned.

    Args:
        sparsity: share of each layer's weights that is zero at the end.
        start: share at the beginning.
        until: share of the steps after which the sparsity is reached.
        every: steps between new masks.
        n: kept of every m; None prunes by share.
        m: consecutive inputs that share a budget.
        decay: of masked weights, added to their gradient; with n of m.
        init: as lsq's; None: scales stay as calibrated, whatever the quantizer.
        training: see TrainingStrategy.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, eq. 1; n of m: Zhou et al.,
    "Learning N:M fine-grained structured sparse neural networks from scratch", 2021, arXiv 2102.04010.
    Equation: s = s_f + (s_i - s_f) (1 - t/T)³; n of m: dw <- dw + λ (1 - mask) w
    """

    name = "prune"

    def __init__(
        self,
        sparsity: float = 0.9,
        start: float = 0.0,
        until: float = 0.75,
        every: int = 1,
        n: int | None = None,
        m: int = 4,
        decay: float = 2e-4,
        init: Literal["lsq", "calibrated"] | None = "lsq",
        **training: Unpack[Training],
    ) -> None:
        super().__init__(init or "calibrated", **training)
        check_budget("finetune.prune", sparsity, n, m)
        if not 0 <= start <= sparsity:
            raise RecipeError(f"finetune.prune.start={start} lies outside 0 to sparsity={sparsity}")
        if not 0 < until <= 1 or every < 1:
            raise RecipeError(
                f"finetune.prune has until={until}, every={every}; use 0 < until <= 1, every >= 1"
            )
        if decay < 0:
            raise RecipeError(f"finetune.prune.decay={decay} is negative; use 0 or more")
        self.learns = init is not None
        self.start, self.sparsity, self.until, self.every = start, sparsity, until, every
        self.n, self.m, self.decay = n, m, decay

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step, where steps are learned."""
        return super().learner(fake_quant) if self.learns else None

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Start the steps, where they are learned."""
        if self.learns:
            super().begin(model, data, task)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Train and prune model in place.

        Raises:
            RecipeError: nothing can be pruned, zero is no level, or training has no end.
        """
        weights = [w for w in weight_quantizers(model) if isinstance(w.module, PRUNED)]
        self._check_prunable(weights, trainer)
        masks = [Mask(weight, self) for weight in weights]
        with _masking(masks), listening(trainer, _Masking(masks, self)):
            super().fit(model, reference, data, task, recipe, trainer)

    def share(self, progress: float) -> float:
        """Return the share of zeros when so much of training, 0 to 1, is done."""
        rest = max(1 - progress / self.until, 0.0)
        return self.sparsity + (self.start - self.sparsity) * rest**3

    def mask(self, weight: Tensor, progress: float) -> Tensor:
        """Return 1 where weight [O, I, *] is kept, 0 elsewhere."""
        if self.n is not None:
            return largest_of_each(weight.abs(), self.n, self.m)
        return largest_share(weight.abs().flatten(), 1 - self.share(progress)).view_as(weight)

    def _check_prunable(self, weights: list[QuantizedWeight], trainer: Trainer) -> None:
        if not weights:
            raise RecipeError("finetune 'prune' found no quantized linear or convolution layer to prune")
        if self.n is not None:
            check_divides("finetune.prune", [w.blocks_input() for w in weights], self.m)
        endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and self.training["epochs"] is None
        if endless:
            raise RecipeError(
                "finetune 'prune' follows a schedule, and training has no end; set trainer.max_epochs"
            )
        for weight in weights:
            with torch.no_grad():
                zeros = weight.fake_quant(torch.zeros_like(weight.blocks_input()))
            if zeros.any():
                quantizer = weight.fake_quant.slot.quantizer.name
                raise RecipeError(
                    f"finetune 'prune' needs zero among the levels of '{weight.name}', and quantizer "
                    f"'{quantizer}' has none there; use weight.quantizer=uniform"
                )


class Mask:
    """What is kept of one weight, applied before it is quantized."""

    def __init__(self, weight: QuantizedWeight, strategy: Prune) -> None:
        self.weight = weight
        self.strategy = strategy
        self.kept = torch.ones_like(weight.blocks_input())

    def follow(self, progress: float) -> None:
        """Choose anew, from the weight as it stands."""
        weight = self.weight.blocks_input()
        self.kept = self.strategy.mask(weight, progress)

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Mask what a quantizer is called with: a forward pre-hook."""
        if self.strategy.n is None:
            return (args[0] * self.kept,)
        masked: Tensor = SparseStraightThrough.apply(args[0], self.kept, self.strategy.decay)  # type: ignore[no-untyped-call]
        return (masked,)

    def settle(self) -> None:
        """Write the zeros into the weight."""
        self.weight.write(self.weight.blocks_input() * self.kept)


class SparseStraightThrough(torch.autograd.Function):
    """Mask x; its gradient passes straight through, plus decay times what is masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, decay: float) -> Tensor:  # noqa: ANN401  # torch's context
        """Return mask * x."""
        ctx.save_for_backward(x, mask)
        ctx.decay = decay
        return mask * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Return gradient + decay (1 - mask) x."""
        x, mask = ctx.saved_tensors
        return gradient + ctx.decay * (1 - mask) * x, None, None


class _Masking(Callback):
    """Choose masks on the way, and make the last ones final."""

    def __init__(self, masks: list[Mask], strategy: Prune) -> None:
        self.masks = masks
        self.strategy = strategy

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Follow the schedule."""
        if trainer.global_step % self.strategy.every == 0 or batch_idx == 0:
            for mask in self.masks:
                mask.follow(trainer.global_step / trainer.estimated_stepping_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reach the sparsity asked for, and write it."""
        for mask in self.masks:
            mask.follow(1.0)
            mask.settle()


@contextmanager
def _masking(masks: list[Mask]) -> Iterator[None]:
    handles = [mask.weight.fake_quant.register_forward_pre_hook(mask) for mask in masks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer pruning during training."""
    return [Prune]

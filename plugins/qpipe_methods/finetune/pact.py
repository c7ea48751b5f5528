"""Learn where activations are clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qpipe import (
    FinetuneStrategy,
    Learner,
    QParams,
    RecipeError,
    Role,
    Slot,
    Task,
    TrainingStrategy,
    hookimpl,
)
from qpipe.functional import scale_eps, straight_through
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training

if TYPE_CHECKING:
    from qpipe import Recipe


class PACT(TrainingStrategy):
    """Train weights and the clipping value of each activation that is never negative.

    Weights, and activations with negative values, are trained straight through at their calibrated range.

    Args:
        init: clipping value at the start; None: the calibrated one. That of an `artifact` is kept.
        penalty: weight of the squared clipping values in the loss.
        training: see TrainingStrategy.

    Source: Choi et al., "PACT", 2018, arXiv 1805.06085, eq. 1 to 3.
    Equation: y = (|x| - |x - α| + α) / 2; dα = 1 where x >= α
    """

    name = "pact"

    def __init__(
        self, init: float | None = 10.0, penalty: float = 1e-4, **training: Unpack[Training]
    ) -> None:
        if init is not None and init <= 0:
            raise ValueError(f"init is a clipping value above 0, not {init}")
        super().__init__(**training)
        self.init = None if self.training["artifact"] else init
        self.weight = penalty

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when no activation has a range to learn, or as TrainingStrategy does."""
        super().check(model, data, task, recipe)
        slots = [slot for role, slot in recipe.every_slot() if role is Role.ACTIVATION]
        if not any(slot.quantizer.is_affine(slot.spec) and not slot.spec.dynamic for slot in slots):
            raise RecipeError(
                "finetune 'pact' learns where activations are clipped, and none has a stored range of affine "
                "codes here; use quantizer=uniform for them, or finetune=qat"
            )

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned clipping value where the range begins at zero."""
        slot, start = fake_quant.slot, fake_quant.qparams()
        one_sided = slot.spec.role is Role.ACTIVATION and bool(
            (start.zero_point == slot.spec.quant_min).all()
        )
        if not one_sided or not slot.quantizer.is_affine(slot.spec):
            return None
        return LearnedClip(slot, start, self.init, self.weight)


class LearnedClip(Learner):
    """Clip to [0, α], then round straight through.

    Args:
        start: scale [B, 1], zero_point [B, 1] at the least code.
        init: α at the start; None: the end of the calibrated range.
        weight: of α² in the loss.
    """

    zero_point: Tensor

    def __init__(self, slot: Slot, start: QParams, init: float | None, weight: float) -> None:
        super().__init__(slot)
        self.weight = weight
        self.num_steps = slot.spec.quant_max - slot.spec.quant_min
        end = (start.scale * self.num_steps).detach()
        self.alpha = nn.Parameter(end.clone() if init is None else torch.full_like(end, init))
        self.register_buffer("zero_point", start.zero_point.detach().clone())

    def qparams(self) -> QParams:
        """Return the step that α makes."""
        return QParams(self.alpha / self.num_steps, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Clip, then round; α learns from what is clipped only."""
        blocks = self.slot.granularity.to_blocks(x)
        clipped = torch.minimum(blocks.clamp(min=0), self.alpha)
        with torch.no_grad():
            rounded = on_blocks(self.slot, x, self.qparams(), training=self.training)
        y = self.slot.granularity.from_blocks(clipped, x.shape)
        return straight_through(y, rounded)

    def penalty(self) -> Tensor:
        """Return weight · Σ α²."""
        return self.weight * self.alpha.square().sum()

    def constrain(self) -> None:
        """Keep clipping values positive."""
        self.alpha.data.clamp_(min=scale_eps(self.slot.spec.num_bits) * self.num_steps)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer learned clipping."""
    return [PACT]

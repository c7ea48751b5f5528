"""Train levels with the weights."""

from __future__ import annotations

from typing import Unpack

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, QParams, RecipeError, Slot, Task, TrainingStrategy, hookimpl
from qpipe.nn import FakeQuant
from qpipe.training import Training, fake_quants


class LearnedLevels(TrainingStrategy):
    """Train weights and the levels they are rounded to, by the task's loss and the rounding error.

    For quantizers whose levels are parameters: codebook, lq, binary_code and the like. Codes are the nearest
    levels; a level's gradient is the sum of those of the values that were rounded to it.

    Args:
        error: weight of the mean squared rounding error, relative to the mean square, in the loss.
        training: see TrainingStrategy.

    Source: Gholami et al., 2021, arXiv 2103.13630, section III-F: min ‖Q(r) - r‖²; Han et al., "Deep
    Compression", 2015, arXiv 1510.00149, section 3.2 (gradients of shared values).
    Equation: dlevel_l = Σ of the gradients of the values with code l
    """

    name = "learned_levels"

    def __init__(self, error: float = 1.0, **training: Unpack[Training]) -> None:
        super().__init__(**training)
        self.error = error

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return learned levels where there is a table of them."""
        start = fake_quant.qparams()
        return Levels(fake_quant.slot, start, self.error) if start.extra else None

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Raise RecipeError when there is no table of levels to learn."""
        if not any(isinstance(fake_quant.learner, Levels) for fake_quant in fake_quants(model)):
            raise RecipeError(
                "finetune 'learned_levels' trains tables of levels, and no quantizer here has one; "
                "use quantizer=codebook, or finetune=lsq for scales"
            )


class Levels(Learner):
    """Fake-quantize with levels that are parameters.

    Args:
        start: whatever extra [B, ...] a quantizer dequantizes by; the scale stays.
        weight: of the rounding error in the loss.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, slot: Slot, start: QParams, weight: float) -> None:
        super().__init__(slot)
        self.weight = weight
        self.register_buffer("scale", start.scale.detach().clone())
        self.register_buffer("zero_point", start.zero_point.detach().clone())
        self.extra = nn.ParameterDict({k: nn.Parameter(v.detach().clone()) for k, v in start.extra.items()})
        self.rounding_error: Tensor | None = None

    def qparams(self) -> QParams:
        """Return the levels as they stand."""
        return QParams(self.scale, self.zero_point, dict(self.extra.items()))

    def forward(self, x: Tensor) -> Tensor:
        """Round x; gradients go to the levels, and straight through to x."""
        quantizer, granularity, spec = self.slot.quantizer, self.slot.granularity, self.slot.spec
        blocks, qparams = granularity.to_blocks(x), self.qparams()
        with torch.no_grad():
            codes = quantizer.quantize(blocks, qparams, spec)
        levels = quantizer.dequantize(codes, qparams, spec)
        target = blocks.detach()
        self.rounding_error = (levels - target).square().mean() / target.square().mean().clamp(min=1e-12)
        return granularity.from_blocks(levels + (blocks - target), x.shape)

    def penalty(self) -> Tensor | None:
        """Return the rounding error of the last forward."""
        error, self.rounding_error = self.rounding_error, None
        return None if error is None else self.weight * error


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer learned levels."""
    return [LearnedLevels]

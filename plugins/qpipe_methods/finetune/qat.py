"""Train with quantizers in place."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from qpipe import Extremes, FinetuneStrategy, Learner, QParams, Range, Role, Slot, TrainingStrategy, hookimpl
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training


class QAT(TrainingStrategy):
    """Train the weights; the gradient passes straight through the rounding, inside the range.

    Args:
        ranges: 'fixed' keeps what calibration found; 'moving' takes weights' extremes anew at each step and
            activations' by a moving average over batches.
        momentum: share of the newest batch in the moving average.
        training: see TrainingStrategy.

    Source: Jacob et al., 2017, arXiv 1712.05877, section 3; Bengio et al., 2013, arXiv 1308.3432.
    Equation: dQ/dx = 1 inside the range, 0 outside; m <- (1 - c) m + c x
    """

    name = "qat"

    def __init__(
        self,
        ranges: Literal["fixed", "moving"] = "fixed",
        momentum: float = 0.01,
        **training: Unpack[Training],
    ) -> None:
        if ranges not in ("fixed", "moving"):
            raise ValueError(f"ranges is fixed or moving, not {ranges!r}")
        super().__init__(**training)
        self.ranges = ranges
        self.momentum = momentum

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a moving range where one is asked for and has a meaning."""
        if self.ranges == "fixed" or not fake_quant.slot.quantizer.uses_range:
            return None
        momentum = 1.0 if fake_quant.slot.spec.role is Role.WEIGHT else self.momentum
        return MovingRange(fake_quant.slot, fake_quant.qparams(), momentum)


class MovingRange(Learner):
    """Range a tensor by a moving average of its extremes; at momentum 1 by the tensor itself.

    Args:
        start: parameters until the first batch.
        momentum: m <- (1 - momentum) m + momentum extremes.
    """

    low: Tensor
    high: Tensor

    def __init__(self, slot: Slot, start: QParams, momentum: float) -> None:
        super().__init__(slot)
        self.momentum = momentum
        self.register_buffer("low", (slot.spec.quant_min - start.zero_point) * start.scale)
        self.register_buffer("high", (slot.spec.quant_max - start.zero_point) * start.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Follow x while training, then round it."""
        if self.training:
            seen = Extremes()
            seen.update(self.slot.granularity.to_blocks(x.detach()))
            now = seen.extremes()
            with torch.no_grad():
                self.low.lerp_(now.low, self.momentum)
                self.high.lerp_(now.high, self.momentum)
        return on_blocks(self.slot, x, self.qparams(), training=self.training)

    def qparams(self) -> QParams:
        """Fit the quantizer to the range as it stands."""
        range_ = Range(self.low, self.high)
        return self.slot.quantizer.fit(Extremes(self.low, self.high), range_, self.slot.spec)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer straight-through training."""
    return [QAT]

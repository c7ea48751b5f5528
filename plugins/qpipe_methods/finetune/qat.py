"""Train with quantizers in place."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from qpipe import (
    Extremes,
    FinetuneStrategy,
    Learner,
    QParams,
    Range,
    Role,
    Samples,
    Slot,
    TrainingStrategy,
    hookimpl,
)
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training


class QAT(TrainingStrategy):
    """Train the weights; the gradient passes straight through the rounding, inside the range.

    Args:
        ranges: 'fixed' keeps what calibration found; 'moving' takes weights' extremes anew at each step and
            activations' by a moving average over batches; levels that are fitted without a range (binary,
            ternary, codebooks) are fitted anew at each step, those of activations averaged alike.
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
        """Return what moves where it is asked for."""
        if self.ranges == "fixed":
            return None
        slot, start = fake_quant.slot, fake_quant.qparams()
        momentum = 1.0 if slot.spec.role is Role.WEIGHT else self.momentum
        return (MovingRange if slot.quantizer.uses_range else MovingFit)(slot, start, momentum)


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


class MovingFit(Learner):
    """Fit levels to a tensor at each step, as a moving average; at momentum 1 to the tensor itself.

    Args:
        start: parameters until the first batch.
        momentum: m <- (1 - momentum) m + momentum fit.
    """

    def __init__(self, slot: Slot, start: QParams, momentum: float) -> None:
        super().__init__(slot)
        self.momentum = momentum
        self.kept = FakeQuant(slot, "fit")  # buffers that move with the model
        self.kept.set_qparams(start)

    def qparams(self) -> QParams:
        """Return the levels as they stand."""
        return self.kept.qparams()

    def forward(self, x: Tensor) -> Tensor:
        """Follow x while training, then round it."""
        if self.training:
            with torch.no_grad():
                self.follow(x)
        return on_blocks(self.slot, x, self.qparams(), training=self.training)

    def follow(self, x: Tensor) -> None:
        """Move towards the fit to x."""
        old = self.qparams()
        new = self.slot.quantizer.fit(Samples(self.slot.granularity.to_blocks(x)), None, self.slot.spec)
        extra = {name: value.lerp(new.extra[name], self.momentum) for name, value in old.extra.items()}
        self.kept.set_qparams(QParams(old.scale.lerp(new.scale, self.momentum), old.zero_point, extra))


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer straight-through training."""
    return [QAT]

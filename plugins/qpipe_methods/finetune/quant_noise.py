"""Quantize a random part of the weights at each step."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, Learner, QParams, Role, Slot, TrainingStrategy, hookimpl
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training


class QuantNoise(TrainingStrategy):
    """Train with each weight quantized at random: the rest gets an unbiased gradient.

    Activations are quantized always; evaluation and export quantize every weight.

    Args:
        rate: share of weights quantized at a step.
        training: see TrainingStrategy.

    Source: Fan et al., "Training with Quantization Noise for Extreme Model Compression", 2020,
    arXiv 2004.07320, eq. 4.
    Equation: w or Q(w), each weight by a coin of probability rate
    """

    name = "quant_noise"

    def __init__(self, rate: float = 0.1, **training: Unpack[Training]) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} lies outside 0 to 1")
        super().__init__(**training)
        self.rate = rate

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return noise for weights."""
        slot = fake_quant.slot
        return Noise(slot, fake_quant.qparams(), self.rate) if slot.spec.role is Role.WEIGHT else None


class Noise(Learner):
    """Round some elements while training, all of them otherwise; parameters stay.

    Args:
        rate: share of elements rounded.
    """

    def __init__(self, slot: Slot, start: QParams, rate: float) -> None:
        super().__init__(slot)
        self.rate = rate
        self.kept = FakeQuant(slot, "noise")  # buffers that move with the model
        self.kept.set_qparams(start)

    def qparams(self) -> QParams:
        """Return the calibrated parameters."""
        return self.kept.qparams()

    def forward(self, x: Tensor) -> Tensor:
        """Replace a random part of x by its rounded values."""
        rounded = on_blocks(self.slot, x, self.qparams(), training=self.training)
        if not self.training:
            return rounded
        return torch.where(torch.rand_like(x) < self.rate, rounded, x)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer quantization noise."""
    return [QuantNoise]

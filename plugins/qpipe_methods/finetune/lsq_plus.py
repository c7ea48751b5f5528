"""Learn the step of every quantizer, and the zero point of activations."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, QParams, Role, Slot, Task, hookimpl
from qpipe.functional import round_ste, scaled_gradient
from qpipe.nn import FakeQuant, on_blocks, weight_quantizers
from qpipe.training import Training
from qpipe_methods.finetune.lsq import LSQ, LearnedStep


class LSQPlus(LSQ):
    """Train weights, steps and the offsets of asymmetric activations together.

    The offset β is kept as the integer zero point -β / s, rounded straight through, which has the paper's
    gradients and leaves real 0 exact; what training ends with needs no rounding.

    Args:
        init: 'lsq_plus' starts weights at max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1) and activations as calibrated
            (with calibrator=mse, the paper's start); 'calibrated' keeps the calibrator's for both.
        training: see TrainingStrategy.

    Source: Bhalgat et al., "LSQ+", 2020, arXiv 2004.09576, eq. 5, 6 and 9.
    Equation: dβ = 0 inside, 1 outside
    """

    name = "lsq_plus"

    def __init__(
        self, init: Literal["lsq_plus", "calibrated"] = "lsq_plus", **training: Unpack[Training]
    ) -> None:
        if init not in ("lsq_plus", "calibrated"):
            raise ValueError(f"init is lsq_plus or calibrated, not {init!r}")
        super().__init__("calibrated", **training)
        self.from_spread = init == "lsq_plus" and not self.training["artifact"]

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step, with an offset for asymmetric activations."""
        slot = fake_quant.slot
        if slot.spec.role is Role.WEIGHT or slot.spec.symmetric:
            return super().learner(fake_quant)
        return LearnedOffset(slot, fake_quant.qparams()) if slot.quantizer.is_affine(slot.spec) else None

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Start the steps of weights from their spread.

        Raises:
            RecipeError: no quantizer of the model has a step.
        """
        super().begin(model, data, task)
        for weight in weight_quantizers(model) if self.from_spread else ():
            learner, slot = weight.fake_quant.learner, weight.fake_quant.slot
            if isinstance(learner, LearnedStep):
                blocks = slot.granularity.to_blocks(weight.blocks_input())
                step = largest_at_three_sigma(blocks) / 2 ** (slot.spec.num_bits - 1)
                learner.scale.data.copy_(torch.where(step > 0, step, learner.scale.data))


def largest_at_three_sigma(blocks: Tensor) -> Tensor:
    """Return max(|μ - 3σ|, |μ + 3σ|) of blocks [B, N], [B, 1]."""
    mean, spread = blocks.mean(-1, keepdim=True), 3 * blocks.std(-1, keepdim=True, correction=0)
    return torch.maximum((mean - spread).abs(), (mean + spread).abs())


class LearnedOffset(LearnedStep):
    """Fake-quantize with a step and a zero point that are parameters."""

    def __init__(self, slot: Slot, start: QParams) -> None:
        super().__init__(slot, start)
        self.offset = nn.Parameter((-start.zero_point * start.scale).detach().clone())

    def qparams(self) -> QParams:
        """Return step and zero point as they stand."""
        return self._with(self.scale, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Round x; both gradients are scaled by 1 / sqrt(N Q_P)."""
        factor = (self.count(x) * max(self.slot.spec.quant_max, 1)) ** -0.5
        qparams = self._with(scaled_gradient(self.scale, factor), scaled_gradient(self.offset, factor))
        return on_blocks(self.slot, x, qparams, training=self.training)

    def _with(self, scale: Tensor, offset: Tensor) -> QParams:
        """Let both learn through the zero point: beyond the range the slope of s at constant β is Q_P."""
        spec = self.slot.spec
        zero_point = round_ste(-offset / scale).clamp(spec.quant_min, spec.quant_max)
        return QParams(scale, zero_point)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer learned steps and offsets."""
    return [LSQPlus]

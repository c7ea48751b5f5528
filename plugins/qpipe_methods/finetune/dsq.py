"""Soften rounding to a tanh in the gradient."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, QParams, Slot, hookimpl
from qpipe.functional import scaled_gradient, straight_through
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training
from qpipe_methods.finetune.lsq import LSQ, LearnedStep


class DSQ(LSQ):
    """Train on hard levels with the gradient of a soft staircase, one tanh between two levels.

    Args:
        init: of the steps, see LSQ.
        alpha: how far the staircase is from rounding, at the start; one a tensor.
        learn: alpha with the weights; false keeps it.
        training: see TrainingStrategy.

    Source: Gong et al., "Differentiable Soft Quantization", 2019, arXiv 1908.05033, eq. 3 to 6.
    Equation: φ = tanh(k (x - m)) / tanh(kΔ/2); k = ln(2/α - 1) / Δ
    """

    name = "dsq"

    def __init__(
        self,
        init: Literal["lsq", "calibrated"] = "lsq",
        alpha: float = 0.4,
        learn: bool = True,
        **training: Unpack[Training],
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha} lies outside 0 to 1")
        super().__init__(init, **training)
        self.alpha = alpha
        self.learn = learn

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a soft staircase where codes have a step."""
        slot = fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            return None
        return SoftStep(slot, fake_quant.qparams(), self.alpha, self.learn)


class SoftStep(LearnedStep):
    """Fake-quantize with a learned step and the gradient of a soft staircase; see DSQ.

    Args:
        alpha, learn: see DSQ.
    """

    def __init__(self, slot: Slot, start: QParams, alpha: float, learn: bool = False) -> None:
        super().__init__(slot, start)
        self.alpha = nn.Parameter(torch.full((1,), alpha), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        """Round x; gradients are the staircase's."""
        spec, granularity = self.slot.spec, self.slot.granularity
        with torch.no_grad():
            hard = on_blocks(self.slot, x, self.qparams(), training=self.training)
        if not torch.is_grad_enabled():
            return hard
        factor = (self.count(x) * max(spec.quant_max, 1)) ** -0.5
        scale = scaled_gradient(self.scale, factor)
        low, high = spec.quant_min - self.zero_point, spec.quant_max - self.zero_point
        ratio = torch.minimum(torch.maximum(granularity.to_blocks(x) / scale, low), high)
        soft = granularity.from_blocks(staircase(ratio, scaled_gradient(self.alpha, factor)) * scale, x.shape)
        return straight_through(soft, hard)

    def constrain(self) -> None:
        """Keep steps positive, and the staircase between rounding and the identity."""
        super().constrain()
        self.alpha.data.clamp_(1e-3, 0.99)


def staircase(ratio: Tensor, alpha: Tensor) -> Tensor:
    """Return the soft rounding of x / Δ: exact at the integers, steepest half-way between two."""
    k = torch.log(2 / alpha - 1)  # so that tanh(k / 2) = 1 - alpha
    floor = ratio.detach().floor()
    return floor + 0.5 + 0.5 * torch.tanh(k * (ratio - floor - 0.5)) / (1 - alpha)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer soft quantization."""
    return [DSQ]

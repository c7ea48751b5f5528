"""Learn the two magnitudes of ternary weights."""

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
    Slot,
    Task,
    TrainingStrategy,
    hookimpl,
)
from qpipe.functional import scale_eps
from qpipe.nn import FakeQuant, weight_quantizers
from qpipe.training import Training
from qpipe_methods.quantizer.ternary import TernaryQuantizer

if TYPE_CHECKING:
    from qpipe import Recipe


_NONE = (
    "finetune 'ttq' learns the levels of ternary weights, and there are none; "
    "use weight.quantizer=ternary weight.num_bits=2"
)


class TTQ(TrainingStrategy):
    """Train weights with the levels -n, 0 and p, which are learned too; 0 up to a share of the largest.

    Both magnitudes start at the mean of |w| beyond the threshold on their side. The paper has one pair a
    layer: granularity=layer. Its eq. 7 leaves out the minus sign of the negative level's gradient; the chain
    rule's is used.

    Args:
        threshold: t, share of max|w| up to which a weight is 0.
        training: see TrainingStrategy.

    Source: Zhu et al., "Trained Ternary Quantization", 2016, arXiv 1612.01064, eq. 6 to 9.
    Equation: Δ = t max|w|; dp = Σ_{w>Δ} g, dn = -Σ_{w<-Δ} g; dw = p g, g or n g
    """

    name = "ttq"

    def __init__(self, threshold: float = 0.05, **training: Unpack[Training]) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} lies outside 0 to 1")
        super().__init__(**training)
        self.threshold = threshold

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when no weight is ternary, or as TrainingStrategy does."""
        super().check(model, data, task, recipe)
        if not any(isinstance(slot.quantizer, TernaryQuantizer) for _, slot in recipe.every_slot()):
            raise RecipeError(_NONE)

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return two learned magnitudes where codes are ternary."""
        slot = fake_quant.slot
        if not isinstance(slot.quantizer, TernaryQuantizer):
            return None
        return LearnedPair(slot, fake_quant.qparams(), self.threshold)

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Start the magnitudes from the weights.

        Raises:
            RecipeError: no weight is ternary.
        """
        found = [w for w in weight_quantizers(model) if isinstance(w.fake_quant.learner, LearnedPair)]
        if not found:
            raise RecipeError(_NONE)
        for weight in () if self.training["artifact"] else found:
            learner = weight.fake_quant.learner
            if isinstance(learner, LearnedPair):
                learner.start(weight.blocks_input())


class LearnedPair(Learner):
    """Fake-quantize to -negative, 0 or positive, both parameters.

    Args:
        start: scale [B, 1], both magnitudes until start() is called.
        share: of the largest magnitude, up to which a value is 0.
    """

    zero_point: Tensor
    threshold: Tensor

    def __init__(self, slot: Slot, start: QParams, share: float) -> None:
        super().__init__(slot)
        self.share = share
        self.positive = nn.Parameter(start.scale.detach().clone())
        self.negative = nn.Parameter(start.extra.get("negative", start.scale).detach().clone())
        self.register_buffer("zero_point", start.zero_point.detach().clone())
        threshold = start.extra.get("threshold", torch.zeros_like(start.scale))
        self.register_buffer("threshold", threshold.detach().clone())

    def start(self, x: Tensor) -> None:
        """Set each magnitude to the mean of what is rounded to it; a side without values keeps its own."""
        blocks = self.slot.granularity.to_blocks(x)
        self.follow(blocks)
        for side, sign in ((self.positive, 1), (self.negative, -1)):
            beyond = sign * blocks > self.threshold
            count = beyond.sum(1, keepdim=True)
            mean = (blocks.abs() * beyond).sum(1, keepdim=True) / count.clamp(min=1)
            side.data.copy_(torch.where(count > 0, mean, side.data))

    def follow(self, blocks: Tensor) -> None:
        """Take the threshold from blocks [B, N]."""
        self.threshold.copy_(self.share * blocks.detach().abs().amax(1, keepdim=True))

    def qparams(self) -> QParams:
        """Return the levels as they stand."""
        extra = {"threshold": self.threshold, "negative": self.negative}
        return QParams(self.positive, self.zero_point, extra)

    def forward(self, x: Tensor) -> Tensor:
        """Round x; the gradient of x is multiplied by the magnitude of its level, by 1 at 0 (eq. 8)."""
        quantizer, granularity, spec = self.slot.quantizer, self.slot.granularity, self.slot.spec
        blocks = granularity.to_blocks(x)
        if self.training:
            self.follow(blocks)
        qparams = self.qparams()
        with torch.no_grad():
            codes = quantizer.quantize(blocks, qparams, spec)
        levels = quantizer.dequantize(codes, qparams, spec)
        slope = torch.where(codes == 0, 1.0, levels.detach().abs())
        return granularity.from_blocks(levels + slope * (blocks - blocks.detach()), x.shape)

    def constrain(self) -> None:
        """Keep magnitudes positive."""
        for side in (self.positive, self.negative):
            side.data.clamp_(min=scale_eps(self.slot.spec.num_bits))


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer trained ternary weights."""
    return [TTQ]

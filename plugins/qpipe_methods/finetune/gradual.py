"""Lower the bits step by step, learning every scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from qpipe import FinetuneStrategy, Learner, QParams, QuantSpec, Range, Slot, hookimpl
from qpipe.functional import affine_qparams
from qpipe.nn import FakeQuant
from qpipe.training import Training, fake_quants
from qpipe_methods.finetune.lsq import LSQ, LearnedStep

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task


class Gradual(LSQ):
    """Train as LSQ does at falling widths, each from where the wider one ended.

    A quantizer never goes below its own bits, and takes them in the last round; one that has more keeps them.

    Args:
        bits: widths of the rounds before the last.
        init: of the steps in every round, see LSQ.
        training: see TrainingStrategy; epochs are those of one round.

    Source: Zhuang et al., "Towards Effective Low-bitwidth Convolutional Neural Networks", 2017, arXiv
    1711.00227, section 3.2 (progressive quantization).
    Equation: K_1 > K_2 > … > K_n, the model of K_i starting from that of K_{i-1}
    """

    name = "gradual"

    def __init__(
        self,
        bits: Sequence[int] = (8, 6, 4),
        init: Literal["lsq", "calibrated"] = "lsq",
        **training: Unpack[Training],
    ) -> None:
        if not bits or list(bits) != sorted(set(bits), reverse=True) or min(bits) < 2:
            raise ValueError(f"bits fall from round to round, down to 2 at least; not {list(bits)}")
        super().__init__(init, **training)
        if (self.training["resume"] or "").endswith(".ckpt"):
            raise ValueError("a checkpoint belongs to one round of several; give resume a folder")
        self.bits = tuple(bits)
        self.width = 0

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step of the round's width where codes have one."""
        slot = fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            return None
        wide = replace(slot.spec, num_bits=max(self.width, slot.spec.num_bits))
        start = rescaled(fake_quant.qparams(), slot.spec, wide)
        return WideStep(replace(slot, spec=wide), start, slot.spec)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Train round by round; rounds that no quantizer is narrow enough for are left out."""
        least = min((f.slot.spec.num_bits for f in fake_quants(model)), default=0)
        asked = self.training
        for width in (*(width for width in self.bits if width > least), least):
            self.width = width
            if asked["resume"]:
                self.training = {**self.training, "resume": f"{asked['resume']}/{width}"}
            super().fit(model, reference, data, task, recipe, trainer)
            self.training = {**self.training, "artifact": None}
        self.training = asked


class WideStep(LearnedStep):
    """Fake-quantize with a learned step at more bits than are kept.

    Args:
        slot: of the round.
        kept: what the parameters are returned for.
    """

    def __init__(self, slot: Slot, start: QParams, kept: QuantSpec) -> None:
        super().__init__(slot, start)
        self.kept = kept

    def qparams(self) -> QParams:
        """Return the step of the kept codes that cover the same range."""
        return rescaled(super().qparams(), self.slot.spec, self.kept)


def rescaled(qparams: QParams, old: QuantSpec, new: QuantSpec) -> QParams:
    """Return the qparams that cover the same range by codes of another width."""
    if old == new:
        return qparams
    low = (old.quant_min - qparams.zero_point) * qparams.scale
    high = (old.quant_max - qparams.zero_point) * qparams.scale
    return affine_qparams(Range(low, high), new)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer falling widths."""
    return [Gradual]

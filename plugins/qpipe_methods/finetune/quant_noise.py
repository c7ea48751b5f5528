"""Quantize a random part of the weights at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from qpipe import FinetuneStrategy, Learner, QParams, Role, Slot, Task, TrainingStrategy, hookimpl
from qpipe.nn import FakeQuant, on_blocks, weight_quantizers
from qpipe.training import Training, listening

if TYPE_CHECKING:
    from qpipe import Recipe, Reference


class QuantNoise(TrainingStrategy):
    """Train with each weight quantized at random: the rest gets an unbiased gradient.

    Activations are quantized always; evaluation and export quantize every weight.

    Args:
        rate: share of weights quantized at a step; of codewords where a code stands for several.
        refit: range weights, or fit their levels, anew after each epoch, as the paper does; false keeps what
            calibration found.
        training: see TrainingStrategy.

    Source: Fan et al., "Training with Quantization Noise for Extreme Model Compression", 2020,
    arXiv 2004.07320, eq. 4.
    Equation: w or Q(w), each weight by a coin of probability rate
    """

    name = "quant_noise"

    def __init__(self, rate: float = 0.1, refit: bool = True, **training: Unpack[Training]) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} lies outside 0 to 1")
        super().__init__(**training)
        self.rate = rate
        self.refit = refit

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return noise for weights."""
        slot = fake_quant.slot
        return Noise(slot, fake_quant.qparams(), self.rate) if slot.spec.role is Role.WEIGHT else None

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Train model in place."""
        callbacks = [_Refitting(model)] if self.refit else []
        with listening(trainer, *callbacks):
            super().fit(model, reference, data, task, recipe, trainer)


class Noise(Learner):
    """Round some elements while training, all of them otherwise.

    Args:
        rate: share of elements rounded.
    """

    def __init__(self, slot: Slot, start: QParams, rate: float) -> None:
        super().__init__(slot)
        self.rate = rate
        self.kept = FakeQuant(slot, "noise")  # buffers that move with the model
        self.kept.set_qparams(start)

    def qparams(self) -> QParams:
        """Return the parameters as they stand."""
        return self.kept.qparams()

    def forward(self, x: Tensor) -> Tensor:
        """Replace a random part of x by its rounded values."""
        rounded = on_blocks(self.slot, x, self.qparams(), training=self.training)
        if not self.training:
            return rounded
        return torch.where(self._draw(x) < self.rate, rounded, x)

    def refit(self, x: Tensor) -> None:
        """Fit the parameters to x, the whole weight."""
        self.kept.set_qparams(self.kept.dynamic_qparams(x))

    def _draw(self, x: Tensor) -> Tensor:
        """Return a number from 0 to 1 for each element; elements of one code have the same."""
        blocks = self.slot.granularity.to_blocks(x.detach())
        num_codes = self.slot.quantizer.num_codes(blocks.shape[1])
        draws = torch.rand(len(blocks), num_codes, dtype=x.dtype, device=x.device)
        return self.slot.granularity.from_blocks(
            draws.repeat_interleave(blocks.shape[1] // num_codes, 1), x.shape
        )


class _Refitting(Callback):
    """Fit the parameters to the weights as they stand after each epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit every weight's."""
        for weight in weight_quantizers(self.model):
            learner = weight.fake_quant.learner
            if isinstance(learner, Noise):
                learner.refit(weight.blocks_input())


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer quantization noise."""
    return [QuantNoise]

"""Learn the step of every quantizer with the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

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
from qpipe.functional import scale_eps, scaled_gradient
from qpipe.nn import FakeQuant, on_blocks
from qpipe.training import Training, mean_magnitudes

if TYPE_CHECKING:
    from qpipe import Recipe


class LSQ(TrainingStrategy):
    """Train weights and steps together.

    Args:
        init: 'lsq' starts a step at 2 mean|x| / sqrt(Q_P), activations from one batch; 'calibrated' keeps the
            calibrator's. Those of an `artifact` are kept.
        training: see TrainingStrategy.

    Source: Esser et al., "Learned Step Size Quantization", 2019, arXiv 1902.08153, eq. 3 and section 2.1.
    Equation: ds = round(v/s) - v/s inside, the bound outside; times 1 / sqrt(N Q_P)
    """

    name = "lsq"
    learns = True  # steps

    def __init__(self, init: Literal["lsq", "calibrated"] = "lsq", **training: Unpack[Training]) -> None:
        if init not in ("lsq", "calibrated"):
            raise ValueError(f"init is lsq or calibrated, not {init!r}")
        super().__init__(**training)
        self.init = "calibrated" if self.training["artifact"] else init

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when no slot has a step to learn, or as TrainingStrategy does."""
        super().check(model, data, task, recipe)
        slots = [slot for _, slot in recipe.every_slot() if not slot.spec.dynamic]
        if self.learns and not any(slot.quantizer.is_affine(slot.spec) for slot in slots):
            raise RecipeError(self._without_steps())

    def _without_steps(self) -> str:
        return (
            f"finetune '{self.name}' learns the scale of affine codes, which no quantizer here has; "
            "use quantizer=uniform, or finetune=qat"
        )

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step where codes have one."""
        slot = fake_quant.slot
        return LearnedStep(slot, fake_quant.qparams()) if slot.quantizer.is_affine(slot.spec) else None

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Start the steps from the magnitudes of weights and of one batch's activations.

        Raises:
            RecipeError: no quantizer of the model has a step.
        """
        steps = [m for m in model.modules() if isinstance(m, LearnedStep)]
        if not steps:
            raise RecipeError(self._without_steps())
        if self.init == "lsq":
            for fake_quant, mean in mean_magnitudes(model, data, task):
                if isinstance(fake_quant.learner, LearnedStep):
                    fake_quant.learner.start(mean)


class LearnedStep(Learner):
    """Fake-quantize with a scale that is a parameter, and the zero point of the start.

    Args:
        start: scale [B, 1], zero_point [B, 1].
    """

    zero_point: Tensor

    def __init__(self, slot: Slot, start: QParams) -> None:
        super().__init__(slot)
        self.scale = nn.Parameter(start.scale.detach().clone())
        self.register_buffer("zero_point", start.zero_point.detach().clone())

    @property
    def largest(self) -> Tensor:
        """Return Q_P [B, 1], the codes above zero; at least 1."""
        return (self.slot.spec.quant_max - self.zero_point).clamp(min=1)

    def start(self, mean_magnitude: Tensor) -> None:
        """Set the step from mean |x| of each block [B, 1]; one of zeros keeps its step."""
        step = 2 * mean_magnitude / self.largest.sqrt()
        self.scale.data.copy_(torch.where(step > 0, step, self.scale.data))

    def qparams(self) -> QParams:
        """Return the step as it stands."""
        return QParams(self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Round x; the step's gradient is scaled by 1 / sqrt(N Q_P)."""
        factor = (self.count(x) * max(self.slot.spec.quant_max, 1)) ** -0.5
        qparams = QParams(scaled_gradient(self.scale, factor), self.zero_point)
        return on_blocks(self.slot, x, qparams, training=self.training)

    def count(self, x: Tensor) -> float:
        """Return N: the weights that share a step, or the features of one sample that do."""
        samples = 1 if self.slot.spec.role is Role.WEIGHT else x.shape[0]
        return max(x.numel() / samples / self.scale.numel(), 1.0)

    def constrain(self) -> None:
        """Keep steps positive."""
        self.scale.data.clamp_(min=scale_eps(self.slot.spec.num_bits))


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer learned steps."""
    return [LSQ]

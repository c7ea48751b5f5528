"""Whatever changes weights or learns parameters after calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe.recipe import Recipe, Reference
    from qpipe.task import Task


class FinetuneStrategy(ABC):
    """Improve a prepared, calibrated model in place: reconstruction and training alike."""

    name: ClassVar[str]

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Improve model; reference is the float model it should agree with."""

"""Whatever changes weights or learns parameters after calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe.recipe import Recipe, Reference, SlotEdit
    from qpipe.task import Task
    from qpipe.types import Role


class FinetuneStrategy(ABC):
    """Improve a prepared, calibrated model in place: reconstruction and training alike."""

    name: ClassVar[str]

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when this has no meaning for them; asked before any data is read."""

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError when the prepared model is none to begin with; asked before calibration."""

    def edits(self, recipe: Recipe) -> Iterable[tuple[Role, SlotEdit]]:
        """Return every change of a slot that fit may make, so that exporters can say no before any work."""
        return ()

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> Mapping[str, Any] | None:
        """Improve model; reference is the float model it should agree with.

        Returns:
            tables for the report, by name, each with lists of rows, a title, a finding; the keys that its
            'print' lists are printed as well.
        """

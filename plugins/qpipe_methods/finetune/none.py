"""No fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qpipe import FinetuneStrategy, hookimpl

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task


class NoFinetuning(FinetuneStrategy):
    """Leave the calibrated model as it is."""

    name = "none"

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Do nothing."""


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer not to fine-tune."""
    return [NoFinetuning]

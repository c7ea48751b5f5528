"""What every layer-by-layer strategy shares."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import nn

from qpipe import FinetuneStrategy, RecipeError
from qpipe.nn import weight_quantizers
from qpipe_methods.reconstruction import Layer, is_layer, reconstruct

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task


class LayerwiseStrategy(FinetuneStrategy):
    """Improve one layer after the other on what the quantized model feeds it.

    Args:
        num_samples: of the calibration set.
        memory_gb: for activations.
    """

    def __init__(self, num_samples: int = 128, memory_gb: float = 4.0) -> None:
        self.num_samples = num_samples
        self.memory_gb = memory_gb

    @abstractmethod
    def improve(self, layer: Layer) -> None:
        """Change the layer's parameters or qparams in place."""

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Improve every quantized linear and convolutional layer, in order of execution."""
        reconstruct(
            model,
            data,
            task,
            self.improve,
            num_samples=self.num_samples,
            memory_gb=self.memory_gb,
            title=self.name,
            shelf=recipe.shelf,
        )


def check_even(what: str, model: nn.Module) -> None:
    """Raise RecipeError where the levels of a layer of a prepared model are not evenly spaced."""
    for weight in filter(is_layer, weight_quantizers(model)):
        slot = weight.fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            raise RecipeError(
                f"{what} needs even steps; quantizer '{slot.quantizer.name}' of '{weight.name}' has none: "
                "use weight.quantizer=uniform"
            )

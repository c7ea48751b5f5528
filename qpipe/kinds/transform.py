"""Float-to-float rewriting before quantization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from qpipe.recipe import Recipe
    from qpipe.task import Batches, Task


class Transform(ABC):
    """Rewrite a float model in place; its function is kept, or the docstring says it is not.

    reads_slots: whether bits, granularity and target change what it does; where not, what it keeps on its
        shelf serves every point of a sweep over them.
    """

    name: ClassVar[str]
    reads_slots: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Rewrite model; batches are the calibration batches, read only if needed."""

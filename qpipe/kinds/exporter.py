"""What is written, and proved to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from qpipe.calls import Call
    from qpipe.recipe import Recipe
    from qpipe.task import Batches, Task
    from qpipe.types import Artifact


@dataclass(frozen=True)
class ExportContext:
    """What an exporter may read.

    Args:
        simulation: the calibrated model with its fake-quantizers; not to be changed (deepcopy it).
        reference: the float model.
        batches: evaluation batches, for the proof.
        folder: where to write; exists, empty, moved into place only after every exporter succeeded.
    """

    simulation: nn.Module
    reference: nn.Module
    batches: Batches
    task: Task
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class Operation:
    """One operation of an executed file.

    Args:
        layer: path of the module it belongs to; '' is none.
        kernel: what is executed, its options, types and shapes: equal ones take equally long.
        microseconds: the least of several calls; what else runs on a machine only adds to it.
    """

    layer: str
    kernel: str
    microseconds: int


class Exporter(ABC):
    """Write an artifact and prove that it does what the simulation does."""

    name: ClassVar[str]

    def reason_not(self, recipe: Recipe) -> str | None:
        """Say in one sentence why this recipe cannot be expressed, or None; asked before any work."""
        return None

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return a module that runs the artifact at path, or None where it does not run by itself."""
        return None

    @abstractmethod
    def export(self, context: ExportContext) -> Artifact:
        """Write into context.folder, run the file in its engine and return the artifact with its proof.

        Raises:
            ProofError: the engine disagrees with the simulation.
        """

    def operations(self, model: nn.Module, call: Call, layers: Collection[str]) -> Sequence[Operation]:
        """Return what the engine executes in a call of a prepared, calibrated model, timed; nothing is kept.

        Args:
            layers: paths of modules; an operation that computes none of them belongs to the one it follows.

        Raises:
            NotImplementedError: no engine says how long its operations take.
            RecipeError: the model cannot be translated.
        """
        raise NotImplementedError(f"exporter '{self.name}' does not time operations")

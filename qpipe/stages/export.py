"""Write every artifact, each proved by its exporter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qpipe.kinds.exporter import ExportContext
from qpipe.types import Artifact

if TYPE_CHECKING:
    from qpipe.recipe import Recipe, Reference
    from qpipe.task import Batches, Task


def export(
    model: nn.Module, reference: Reference, batches: Batches, task: Task, recipe: Recipe, folder: Path
) -> tuple[Artifact, ...]:
    """Run every exporter in its own sub-folder; paths in the artifacts are relative to folder.

    Raises:
        ProofError: a file does not do what the simulation does.
    """
    artifacts = []
    for exporter in recipe.exporters:
        place = folder / exporter.name
        place.mkdir()
        context = ExportContext(model, reference.model, batches, task, recipe, place)
        artifact = exporter.export(context)
        artifacts.append(replace(artifact, path=Path(exporter.name) / artifact.path))
    return tuple(artifacts)

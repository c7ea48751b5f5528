"""What is measured."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from qpipe.recipe import Recipe, Reference
    from qpipe.task import Batches, Task
    from qpipe.types import Artifact


@dataclass(frozen=True)
class Subject:
    """What an evaluator looks at.

    Args:
        variant: 'fp32', 'simulated', or the name of the exporter whose file is executed.
        model: called like the user's model.
        batches: evaluation batches.
        artifact: the file, when the variant is one.
    """

    variant: str
    model: nn.Module
    reference: Reference
    batches: Batches
    task: Task
    recipe: Recipe
    artifact: Artifact | None = None


class Evaluator(ABC):
    """Measure a variant of the model: in the one pass over the data, once on its own, or both."""

    name: ClassVar[str]
    measured: ClassVar[tuple[str, ...]] = ()  # the names measure() returns, as far as they are known before
    repeatable: ClassVar[bool] = True  # measures the same of the same model again; a time does not

    def metrics(self, task: Task, variant: str) -> Mapping[str, Metric]:
        """Metrics fed in the shared pass: update(output, reference_output, batch); named with their unit."""
        return {}

    def samples(
        self,
        task: Task,
        output: Any,  # noqa: ANN401
        reference_output: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
    ) -> Mapping[str, Tensor]:
        """Return a metric sample by sample, so that two runs can be compared in pairs, by the metric's name.

        [n] where it is the mean over samples; [n, 2] where it is a ratio of sums over samples (in decibels if
        its name says so), its numerator and denominator.
        """
        return {}

    def measure(self, subject: Subject) -> Mapping[str, float]:
        """Measure once, outside the pass (size, latency); named with their unit."""
        return {}

    def tables(self, subject: Subject) -> Mapping[str, Any]:
        """Return what is more than a number (SQNR by edge), for report.json, the run's page and CSV files.

        A list of mappings is a table, or where its rows have 'counts' a set of histograms; the first column
        with a unit is drawn as bars. 'title' and 'about' head them; one sentence, 'finding', opens the page.
        """
        return {}

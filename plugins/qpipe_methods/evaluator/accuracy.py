"""The task's own metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from qpipe import Evaluator, Task, hookimpl


class OfOutput(Metric):
    """Feed a task's metric, which knows no reference."""

    full_state_update = False

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def update(self, output: Any, reference_output: Any, batch: Any) -> None:  # noqa: ANN401
        """Take in one batch."""
        self.metric.update(output, batch)

    def compute(self) -> Tensor:
        """Return the metric."""
        value: Tensor = self.metric.compute()
        return value


class AccuracyEvaluator(Evaluator):
    """Measure what the task measures, for every variant."""

    name = "accuracy"

    def metrics(self, task: Task, variant: str) -> Mapping[str, Metric]:
        """Return the task's metrics."""
        return {name: OfOutput(metric) for name, metric in task.metrics().items()}

    def samples(
        self,
        task: Task,
        output: Any,  # noqa: ANN401
        reference_output: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
    ) -> Mapping[str, Tensor]:
        """Return the task's own scores."""
        return task.scores(output, batch)


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the task's metrics."""
    return [AccuracyEvaluator]

"""Telling classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from qpipe import Task


class Top1Percent(Metric):
    """Count how often the largest output is the label.

    Args:
        task: finds the output that is compared, its classes and the labels of a batch.
    """

    correct: Tensor
    total: Tensor

    def __init__(self, task: Classification) -> None:
        super().__init__()
        self.task = task
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, batch: Any) -> None:  # noqa: ANN401  # a user's output and batch
        """Take in one batch."""
        labels = self.task.labels(batch)
        hits = self.task.compared(output).argmax(self.task.class_dim) == labels
        self.correct += hits.sum()
        self.total += hits.numel()

    def compute(self) -> Tensor:
        """Return the percentage of right answers."""
        return 100.0 * self.correct.cpu().double() / self.total.cpu()


class Classification(Task):
    """Tell classes apart: cross entropy, and the percentage whose largest output is the label.

    A batch is (inputs, labels) or a dict with 'labels' (or 'label').

    Args:
        class_dim: dimension of the output that ranges over classes.
    """

    class_dim: int

    def __init__(self, class_dim: int = -1) -> None:
        super().__init__(class_dim)

    def labels(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the labels of a batch [B]."""
        if isinstance(batch, Mapping):
            found: Tensor = batch["labels"] if "labels" in batch else batch["label"]
            return found
        labels: Tensor = batch[1]
        return labels

    def loss(self, output: Any, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the mean cross entropy."""
        return F.cross_entropy(self.compared(output).movedim(self.class_dim, 1), self.labels(batch))

    def metrics(self) -> Mapping[str, Metric]:
        """Return top1_percent."""
        return {"top1_percent": Top1Percent(self)}

    def scores(self, output: Any, batch: Any) -> Mapping[str, Tensor]:  # noqa: ANN401
        """Return the percentage of right answers of each sample."""
        hits = self.compared(output).argmax(self.class_dim) == self.labels(batch)
        return {"top1_percent": 100.0 * hits.flatten(1).float().mean(1) if hits.dim() > 1 else 100.0 * hits}

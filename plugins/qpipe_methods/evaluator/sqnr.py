"""How far the output is from the float model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from qpipe import Evaluator, Task, hookimpl


class Mean(Metric):
    """Divide one sum by another, both taken over all batches.

    Args:
        task: finds the compared tensor in an output.
        sums: (output, reference) -> (numerator, denominator).
        finish: quotient -> metric.
    """

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(
        self,
        task: Task,
        sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.task, self.sums, self.finish = task, sums, finish
        for name in ("numerator", "denominator"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: Any, reference_output: Any, batch: Any) -> None:  # noqa: ANN401  # a user's
        """Take in one batch."""
        compared, reference = self.task.compared(output), self.task.compared(reference_output)
        numerator, denominator = self.sums(compared.double(), reference.to(compared.device).double())
        self.numerator += numerator
        self.denominator += denominator

    def compute(self) -> Tensor:
        """Return the metric."""
        return self.finish(self.numerator / self.denominator)


class SQNREvaluator(Evaluator):
    """Compare every variant's output with the float model's.

    sqnr_db is 10 log10 of the signal's energy over the error's, both summed over the whole set;
    agreement_percent how often the largest outputs are the same; mean_cosine the mean over samples.
    """

    name = "sqnr"

    def metrics(self, task: Task, variant: str) -> Mapping[str, Metric]:
        """Return sqnr_db, mean_cosine and, where classes have a dimension, agreement_percent."""
        if variant == "fp32":
            return {}
        metrics = {
            "sqnr_db": Mean(task, _energies, lambda ratio: 10 * torch.log10(ratio)),
            "mean_cosine": Mean(task, _cosines, lambda mean: mean),
        }
        dim = task.class_dim
        if dim is None:
            return metrics

        def agreements(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
            equal = x.argmax(dim) == reference.argmax(dim)
            return equal.sum(), torch.tensor(equal.numel())

        return {**metrics, "agreement_percent": Mean(task, agreements, lambda mean: 100 * mean)}

    def samples(
        self,
        task: Task,
        output: Any,  # noqa: ANN401
        reference_output: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
    ) -> Mapping[str, Tensor]:
        """Return the same sample by sample, sqnr_db as the energies of signal and noise."""
        x = task.compared(output).double()
        reference = task.compared(reference_output).to(x.device).double()
        rows, expected = (t.reshape(len(t) if t.dim() else 1, -1) for t in (x, reference))
        energies = expected.square().sum(1), (rows - expected).square().sum(1)
        found = {
            "sqnr_db": torch.stack(energies, 1),
            "mean_cosine": torch.cosine_similarity(rows, expected, dim=1),
        }
        if task.class_dim is not None:
            equal = x.argmax(task.class_dim) == reference.argmax(task.class_dim)
            found["agreement_percent"] = 100 * equal.double().reshape(len(equal), -1).mean(1)
        return found


def _energies(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return reference.square().sum(), (x - reference).square().sum()


def _cosines(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    cosines = torch.cosine_similarity(x.flatten(1), reference.flatten(1), dim=1)
    return cosines.sum(), torch.tensor(len(cosines))


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the comparison with the float model."""
    return [SQNREvaluator]

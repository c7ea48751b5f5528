"""Average the extremes of batches: one odd batch does not set the range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpipe import BatchExtremes, Calibrator, Quantizer, QuantSpec, Range, RecipeError, Role, hookimpl


class MovingAverageCalibrator(Calibrator[BatchExtremes]):
    """Fold the batches in their global order, so that any number of processes gives one answer.

    Args:
        averaging_constant: c in m <- (1 - c) m + c x, in (0, 1]; the first batch starts the average.

    Source: Jacob et al., 2017, arXiv 1712.05877, 3.1.
    Equation: m <- (1 - c) m + c x
    """

    name = "moving_average"
    roles = frozenset({Role.ACTIVATION})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.WEIGHT: "minmax"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.WEIGHT: "a weight is seen once, so there is nothing to average"
    }
    needs = BatchExtremes
    dynamic = False

    def __init__(self, averaging_constant: float = 0.01) -> None:
        if not 0 < averaging_constant <= 1:
            raise RecipeError(
                "calibrator 'moving_average': averaging_constant must lie in (0, 1], "
                f"not {averaging_constant}"
            )
        self.averaging_constant = averaging_constant

    def range(self, stats: BatchExtremes, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the average of each end, over the batches a block was seen in."""
        weights = self._weights(stats.low <= stats.high)
        return Range(_average(stats.low, weights), _average(stats.high, weights))

    def _weights(self, seen: Tensor) -> Tensor:
        """Closed form: (1-c)^(n-1) for the first of n batches, c (1-c)^(n-i) for the i-th."""
        c = self.averaging_constant
        after = seen.flip(1).cumsum(1).flip(1) - 1  # batches seen after this one, n - i
        first = seen & (seen.cumsum(1) == 1)
        share = torch.where(first, 1.0, c).double() * torch.tensor(1 - c, dtype=torch.float64) ** after
        return share.masked_fill(~seen, 0)


def _average(ends: Tensor, weights: Tensor) -> Tensor:
    values = torch.where(weights > 0, ends.double(), 0)
    return (values * weights).sum(1, keepdim=True).float()


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the moving-average calibrator."""
    return [MovingAverageCalibrator]

"""Clip where the squared rounding-plus-clipping error is least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpipe import Calibrator, Distribution, Histogram, Quantizer, QuantSpec, Range, RecipeError, hookimpl


class MSECalibrator(Calibrator[Distribution]):
    """Search the clip of each block, for whatever levels the quantizer has; never worse than min-max.

    Both ends shrink by one ratio; an asymmetric range is then refined end by end.

    Args:
        steps: ratios tried, evenly spaced in (0, 1], and as many between the neighbours of the best.

    Source: Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019.
    Equation: argmin_r Σ (Q(x; r low, r high) - x)²
    """

    name = "mse"
    needs = Histogram

    def __init__(self, steps: int = 50) -> None:
        if steps < 2:
            raise RecipeError(f"calibrator 'mse': steps must be at least 2, not {steps}")
        self.steps = steps

    def range(self, stats: Distribution, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the candidate of least squared error."""
        ends = stats.extremes()

        def error(low: Tensor, high: Tensor) -> Tensor:
            count = (len(ends.low), max(low.shape[1], high.shape[1]))
            tried = Range((ends.low * low).expand(count), (ends.high * high).expand(count))
            return stats.squared_error(tried, quantizer, spec)

        low = high = self._search(lambda ratio: error(ratio, ratio), torch.ones_like(ends.low))
        if not spec.symmetric and bool(((ends.low < 0) & (ends.high > 0)).any()):
            low = self._search(lambda ratio: error(ratio, high), low)
            high = self._search(lambda ratio: error(low, ratio), high)
        return Range(ends.low * low, ends.high * high)

    def _search(self, error: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """Return the ratio [B, 1] of least error: start, on the grid, or near the grid's best."""
        grid = torch.arange(1, self.steps + 1, device=start.device) / self.steps
        best = _least(error, torch.cat([start, grid.expand(len(start), -1)], 1))
        near = best + torch.linspace(-1, 1, self.steps | 1, device=start.device) / self.steps  # odd: 0 is one
        return _least(error, near.clamp(1 / self.steps**2, 1))


def _least(error: Callable[[Tensor], Tensor], ratios: Tensor) -> Tensor:
    return ratios.gather(1, error(ratios).argmin(1, keepdim=True))


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the MSE calibrator."""
    return [MSECalibrator]

"""Clip the few largest magnitudes."""

from __future__ import annotations

from typing import Any

from qpipe import Calibrator, Distribution, Histogram, Quantizer, QuantSpec, Range, RecipeError, hookimpl


class PercentileCalibrator(Calibrator[Distribution]):
    """Take the magnitude that a percentage of the elements does not exceed, within what was seen.

    Args:
        percentile: of |x|, in (0, 100].

    Source: Wu et al., 2020, arXiv 2004.09602.
    Equation: the p-th percentile of |x|
    """

    name = "percentile"
    needs = Histogram

    def __init__(self, percentile: float = 99.99) -> None:
        if not 0 < percentile <= 100:
            raise RecipeError(f"calibrator 'percentile': percentile must lie in (0, 100], not {percentile}")
        self.percentile = percentile

    def range(self, stats: Distribution, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the extremes, cut at the percentile of |x|."""
        return stats.extremes().clipped(stats.magnitude_quantile(self.percentile / 100))


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the percentile calibrator."""
    return [PercentileCalibrator]

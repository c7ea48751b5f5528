"""Clip nothing: the range is what was seen."""

from __future__ import annotations

from typing import Any

from qpipe import Calibrator, Quantizer, QuantSpec, Range, Statistics, hookimpl


class MinMaxCalibrator(Calibrator[Statistics]):
    """Take the least and the largest value as the range.

    Source: Krishnamoorthi, 2018, arXiv 1806.08342.
    Equation: low = min x, high = max x
    """

    name = "minmax"

    def range(self, stats: Statistics, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the extremes."""
        return stats.extremes()


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the min-max calibrator."""
    return [MinMaxCalibrator]

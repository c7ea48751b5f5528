"""Clip what lies further from the mean than a few standard deviations."""

from __future__ import annotations

from typing import Any

from qpipe import Calibrator, Distribution, Histogram, Quantizer, QuantSpec, Range, hookimpl


class SigmaCalibrator(Calibrator[Distribution]):
    """Take the mean and so many standard deviations, within what was seen.

    Args:
        num_sigmas: standard deviations that are kept on each side.
    """

    name = "sigma"
    needs = Histogram

    def __init__(self, num_sigmas: float = 4.0) -> None:
        self.num_sigmas = num_sigmas

    def range(self, stats: Distribution, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the extremes, cut at the mean plus or minus num_sigmas."""
        seen, mean, reach = stats.extremes(), stats.mean(), self.num_sigmas * stats.std()
        return Range((mean - reach).clamp(seen.low, seen.high), (mean + reach).clamp(seen.low, seen.high))


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the sigma calibrator."""
    return [SigmaCalibrator]

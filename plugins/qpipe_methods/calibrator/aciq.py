"""Clip where a Gauss or Laplace distribution of the same moments is quantized best."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpipe import Calibrator, Distribution, Histogram, Quantizer, QuantSpec, Range, RecipeError, hookimpl

_KINDS = ("auto", "gauss", "laplace")
_BETWEEN = (math.sqrt(2 / math.pi) + math.sqrt(1 / 2)) / 2  # E|x| / sigma: Gauss 0.798, Laplace 0.707


class ACIQCalibrator(Calibrator[Distribution]):
    """Take the analytic clip of the distribution that fits; no search.

    Moments are about the mean, about zero for symmetric codes; a tensor without negative values (after a
    ReLU) is taken for the positive half of a distribution about zero, and has one more bit for it.

    Args:
        distribution: 'gauss', 'laplace', or 'auto': whichever has the nearer E|x| / sigma, block by block.

    Source: Banner et al., 2018, arXiv 1810.05723.
    Equation: clip t b with exp(-t) = t / (3 · 4^M) for Laplace; σ times the Gaussian one
    """

    name = "aciq"
    needs = Histogram

    def __init__(self, distribution: str = "auto") -> None:
        if distribution not in _KINDS:
            raise RecipeError(
                f"calibrator 'aciq': distribution must be one of {', '.join(_KINDS)}, not '{distribution}'"
            )
        self.distribution = distribution

    def range(self, stats: Distribution, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return centre +- clip, within what was seen."""
        ends = stats.extremes()
        one_sided = ends.low >= 0
        centre = torch.zeros_like(ends.low) if spec.symmetric else stats.mean().masked_fill(one_sided, 0)
        sigma, magnitude = self._moments(stats, centre, one_sided)
        if spec.symmetric and spec.signed:
            one_sided = torch.zeros_like(one_sided)  # half of the codes stay unused
        bits = spec.num_bits
        gauss = torch.where(one_sided, gauss_clip(bits + 1), gauss_clip(bits)) * sigma
        laplace = torch.where(one_sided, laplace_clip(bits + 1), laplace_clip(bits)) * magnitude
        clip = torch.where(self._is_gauss(sigma, magnitude), gauss, laplace)
        return Range((centre - clip).clamp(ends.low, ends.high), (centre + clip).clamp(ends.low, ends.high))

    def _moments(self, stats: Distribution, centre: Tensor, one_sided: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigma and E|x - centre|; of what is positive, where nothing is negative."""
        present = torch.where(one_sided, stats.expectation(torch.sign), 1).clamp(min=1e-12)
        return (stats.deviation(centre, 2) / present).sqrt(), stats.deviation(centre) / present

    def _is_gauss(self, sigma: Tensor, magnitude: Tensor) -> Tensor:
        if self.distribution == "auto":
            return magnitude >= _BETWEEN * sigma
        return torch.full_like(sigma, self.distribution == "gauss").bool()


def laplace_clip(num_bits: int) -> float:
    """Return a/b that minimises 2 b^2 exp(-a/b) + a^2 / (3 4^M): the root of exp(-t) = t / (3 4^M)."""
    return _root(lambda t: t / (3 * 4**num_bits) - math.exp(-t))


def gauss_clip(num_bits: int) -> float:
    """Return a/sigma that minimises the error of N(0, 1) clipped at a: the root of its derivative."""
    density = math.sqrt(2 / math.pi)
    return _root(
        lambda a: a * math.erfc(a / math.sqrt(2)) + a / (3 * 4**num_bits) - density * math.exp(-a * a / 2)
    )


def _root(function: Callable[[float], float]) -> float:
    """Return where function, negative at 0 and positive at 64, changes sign."""
    low, high = 0.0, 64.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the ACIQ calibrator."""
    return [ACIQCalibrator]

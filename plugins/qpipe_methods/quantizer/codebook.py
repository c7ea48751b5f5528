"""Fit the levels themselves: k-means in one dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, hookimpl
from qpipe.functional import Rounding, straight_through
from qpipe.levels import fit_blocks, lloyd_max, nearest_codes, take_levels


class CodebookQuantizer(Quantizer[Distribution]):
    """2^num_bits levels a block, of least squared error: thresholds midway, levels the means of their cells.

    The levels hold the units (the scale is 1); 0 is a level only where the data make it one.

    Args:
        max_iterations: of Lloyd's algorithm, which stops when no level moves.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for Minimum Distortion", 1960;
    Han et al., "Deep Compression", 2015, arXiv 1510.00149, section 3.
    Equation: t_i = (l_i + l_{i+1}) / 2; l_i = E[x | t_{i-1} < x <= t_i]
    """

    name = "codebook"
    needs = Histogram
    uses_range = False

    def __init__(self, max_iterations: int = 100, rounding: Rounding = "nearest") -> None:
        self.max_iterations = max_iterations
        self.rounding = rounding

    def check(self, spec: QuantSpec) -> None:
        """Refuse codebooks larger than what they code."""
        if spec.num_bits > 8:
            raise RecipeError(
                f"quantizer 'codebook' keeps a table of 2^num_bits levels for every block; "
                f"use {spec.role.value}.num_bits of 1 to 8, not {spec.num_bits}"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit levels [B, 2^num_bits], ascending."""
        levels = fit_blocks(stats, lambda points: lloyd_max(points, 2**spec.num_bits, self.max_iterations))
        scale = torch.ones_like(levels[:, :1])
        return QParams(scale, torch.zeros_like(scale), {"levels": levels})

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the index of the nearest level."""
        return nearest_codes(x, qparams.extra["levels"].to(x.dtype), self.rounding)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the levels."""
        return take_levels(codes, qparams.extra["levels"])

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes between the outer ones."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        levels = qparams.extra["levels"].detach()
        return straight_through(torch.minimum(torch.maximum(x, levels[:, :1]), levels[:, -1:]), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes count the levels from 0."""
        return 0


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer fitted levels."""
    return [CodebookQuantizer]

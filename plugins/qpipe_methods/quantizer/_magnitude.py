"""Codes that hold a sign and the index of a magnitude; the code of 0 stands between them."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import QParams, QuantSpec, Range, RecipeError, Statistics
from qpipe.functional import scale_eps


def largest(stats: Statistics, range: Range | None, spec: QuantSpec) -> Tensor:
    """Return the larger end of each block's range, or of all it holds, [B, 1], at least scale_eps."""
    range = range or stats.extremes()
    return torch.maximum(range.low.abs(), range.high.abs()).clamp(min=scale_eps(spec.num_bits))


def zero_code(stats: Statistics, range: Range | None, spec: QuantSpec) -> Tensor:
    """Return the code of 0: half of the codes are negative where unsigned codes must hold negative values.

    Raises:
        RecipeError: negative values for symmetric unsigned codes.
    """
    range = range or stats.extremes()
    negative = range.low < 0
    if spec.signed:
        return torch.zeros_like(range.low)
    if spec.symmetric and bool(negative.any()):
        raise RecipeError(
            f"symmetric unsigned codes cannot hold negative values (least: {range.low.min().item():.4g}); "
            "use signed=true or symmetric=false"
        )
    return negative.to(range.low) * 2.0 ** (spec.num_bits - 1)


def num_magnitudes(qparams: QParams, spec: QuantSpec) -> Tensor:
    """Return how many magnitudes above 0 the codes of each block hold, [B, 1]."""
    half = (
        qparams.zero_point > 0 if not spec.signed else torch.ones_like(qparams.zero_point, dtype=torch.bool)
    )
    return torch.where(half, 2.0 ** (spec.num_bits - 1), 2.0**spec.num_bits).to(qparams.scale) - 1


def join(x: Tensor, index: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Return the codes of x from the indices of its magnitudes; 0 for negatives that no code holds."""
    least = 1 - 2 ** (spec.num_bits - 1) if spec.signed else 0
    return (torch.sign(x) * index + qparams.zero_point).clamp(min=least)


def bounded(x: Tensor, largest: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Clamp x to ±largest, or to 0 from below where no code is negative: the gradient's mask."""
    least = -largest if spec.signed else -largest * (qparams.zero_point > 0)
    return torch.minimum(torch.maximum(x, least), largest)

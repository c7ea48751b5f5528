"""Round to minus one, zero and one, times a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, hookimpl
from qpipe.functional import scale_eps
from qpipe.levels import Points, fit_blocks


class TernaryQuantizer(Quantizer[Distribution]):
    """Levels -α, 0, α: 0 up to a threshold, α the mean magnitude beyond it.

    finetune=ttq learns a second magnitude, for the negative level; it is kept as extra 'negative'.

    Args:
        exact: search the threshold of least squared error, instead of the paper's 0.7 E|x|.

    Source: Li et al., "Ternary Weight Networks", 2016, arXiv 1605.04711, eq. 3 to 6.
    Equation: Δ = 0.7 E|W|; α = mean of |W| over |W| > Δ
    """

    name = "ternary"
    needs = Histogram
    uses_range = False

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def check(self, spec: QuantSpec) -> None:
        """Refuse other than two bits."""
        if spec.num_bits != 2:
            raise RecipeError(
                f"quantizer 'ternary' has 3 levels, stored in 2 bits, not {spec.num_bits}; "
                f"set {spec.role.value}.num_bits=2, or another {spec.role.value}.quantizer"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Find threshold and scale of each block."""
        fitted = fit_blocks(stats, _best if self.exact else _rule)
        scale = fitted[:, 1:].clamp(min=scale_eps(2))
        return QParams(scale, torch.zeros_like(scale), {"threshold": fitted[:, :1]})

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return -1, 0 or 1."""
        return torch.sign(x) * (x.abs() > qparams.extra["threshold"])

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return scale, 0, or what stands below 0: -scale unless another magnitude was learned."""
        negative = qparams.extra.get("negative", qparams.scale)
        return codes * torch.where(codes < 0, negative, qparams.scale)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are -1, 0 and 1."""
        return -1


def _rule(points: Points) -> Tensor:
    """Return threshold and scale, [B, 2], by the paper's rule."""
    magnitudes = Points(points.values.abs(), points.counts)
    mean = (magnitudes.values * magnitudes.counts).sum(1, keepdim=True) / magnitudes.counts.sum(
        1, keepdim=True
    )
    threshold = 0.7 * mean
    counts, totals = magnitudes.cells(threshold)
    return torch.cat([threshold, totals[:, 1:] / counts[:, 1:].clamp(min=1)], 1)


def _best(points: Points) -> Tensor:
    """Return threshold and scale, [B, 2]: the error is ||x||² - S² / C for sum S and count C beyond it."""
    magnitudes = Points(points.values.abs(), points.counts)
    counts = magnitudes.counts.flip(1).cumsum(1)
    totals = (magnitudes.counts * magnitudes.values).flip(1).cumsum(1)
    best = (totals.square() / counts.clamp(min=1)).argmax(1, keepdim=True)
    scale = totals.gather(1, best) / counts.gather(1, best).clamp(min=1)
    return torch.cat([scale / 2, scale], 1)


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer three levels."""
    return [TernaryQuantizer]

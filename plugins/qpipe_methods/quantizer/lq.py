"""Learn a basis whose sums are the levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, Role, hookimpl
from qpipe.functional import straight_through
from qpipe.levels import Points, fit_basis, fit_blocks
from qpipe_methods.quantizer._sums import nearest_sums, patterns, sums


class LQQuantizer(Quantizer[Distribution]):
    """Levels v · e of a basis v, e in {-1, 1}^K for weights and {0, 1}^K for activations, K = num_bits.

    The basis starts from even levels over the values seen and is fitted by the paper's QEM until it rests (in
    training the paper takes one QEM step a batch). It holds the units (the scale is 1).

    Args:
        max_iterations: of QEM, which stops when the basis rests.

    Source: Zhang et al., "LQ-Nets", 2018, arXiv 1807.10029, eq. 5 and algorithm 1.
    Equation: B* = nearest level; v* = (B B^T)^-1 B x
    """

    name = "lq"
    needs = Histogram
    uses_range = False

    def __init__(self, max_iterations: int = 100) -> None:
        self.max_iterations = max_iterations

    def check(self, spec: QuantSpec) -> None:
        """Refuse more sums than a table should hold."""
        if spec.num_bits > 8:
            raise RecipeError(
                f"quantizer 'lq' looks among 2^num_bits sums; "
                f"use {spec.role.value}.num_bits of 1 to 8, not {spec.num_bits}"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit the basis [B, num_bits]."""
        basis = fit_blocks(stats, lambda points: self._fit(points, spec))
        scale = torch.ones_like(basis[:, :1])
        return QParams(scale, torch.zeros_like(scale), {"basis": basis})

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the encoding e as bits, the first basis element's lowest."""
        return nearest_sums(x, qparams.extra["basis"], _off(spec))

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return v · e."""
        return sums(codes, qparams.extra["basis"], _off(spec))

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient of activations passes up to the outer levels, eq. 11."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        if spec.role is Role.WEIGHT:
            return straight_through(x, value)
        basis = qparams.extra["basis"]
        low, high = basis.clamp(max=0).sum(1, keepdim=True), basis.clamp(min=0).sum(1, keepdim=True)
        return straight_through(torch.minimum(torch.maximum(x, low), high), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are bit patterns."""
        return 0

    def _fit(self, points: Points, spec: QuantSpec) -> Tensor:
        low, high = points.values[:, :1], points.values[:, -1:]
        powers = 2.0 ** torch.arange(spec.num_bits, dtype=low.dtype, device=low.device)
        if spec.role is Role.WEIGHT:
            start = torch.maximum(-low, high) * powers / powers.sum()
        else:  # below 0 the highest bit counts down, as in two's complement
            start = (high - low.clamp(max=0)) * powers / powers.sum()
            start[:, -1] *= torch.where(low[:, 0] < 0, -1.0, 1.0)
        return fit_basis(points, start, patterns(spec.num_bits, _off(spec), start), self.max_iterations)


def _off(spec: QuantSpec) -> float:
    """Return what a bit that is not set stands for."""
    return -1.0 if spec.role is Role.WEIGHT else 0.0


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer LQ-Nets' levels."""
    return [LQQuantizer]

"""Write each value as a sum of a few coefficients, plus or minus."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, hookimpl
from qpipe.levels import Points, fit_basis, fit_blocks
from qpipe_methods.quantizer._sums import nearest_sums, patterns, sums


class BinaryCodeQuantizer(Quantizer[Distribution]):
    """Levels Σ ±a_i over num_bits coefficients; bit i of a code is the sign of a_i.

    The coefficients hold the units (the scale is 1); 0 is no level.

    Args:
        method: 'greedy' takes sign and mean magnitude of what is left, one bit at a time, for both
            coefficients and codes; 'alternating' goes on from there with nearest sums and least squares.
        max_iterations: of the alternation, which stops when no coefficient moves.

    Source: Guo et al., "Network Sketching", 2017, arXiv 1706.02021, algorithm 1 (greedy); Xu et al.,
    "Alternating Multi-bit Quantization for Recurrent Neural Networks", 2018, arXiv 1802.00150, algorithm 2.
    Equation: b_i = sign(r), a_i = mean|r|, r <- r - a_i b_i; a = (B^T B)^-1 B^T w
    """

    name = "binary_code"
    needs = Histogram
    uses_range = False

    def __init__(
        self, method: Literal["greedy", "alternating"] = "alternating", max_iterations: int = 20
    ) -> None:
        if method not in ("greedy", "alternating"):
            raise RecipeError(f"quantizer.method={method} is unknown; use greedy or alternating")
        self.method = method
        self.max_iterations = max_iterations

    def check(self, spec: QuantSpec) -> None:
        """Refuse more sums than a table should hold."""
        if spec.num_bits > 8:
            raise RecipeError(
                f"quantizer 'binary_code' looks among 2^num_bits sums; "
                f"use {spec.role.value}.num_bits of 1 to 8, not {spec.num_bits}"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit coefficients [B, num_bits]."""
        basis = fit_blocks(stats, lambda points: self._fit(points, spec.num_bits))
        scale = torch.ones_like(basis[:, :1])
        return QParams(scale, torch.zeros_like(scale), {"basis": basis})

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the signs as bits, the first coefficient's lowest."""
        basis = qparams.extra["basis"]
        return _greedy_codes(x, basis) if self.method == "greedy" else nearest_sums(x, basis, -1.0)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the sums."""
        return sums(codes, qparams.extra["basis"], -1.0)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are bit patterns."""
        return 0

    def _fit(self, points: Points, num_bits: int) -> Tensor:
        basis = _greedy_basis(points, num_bits)
        if self.method == "greedy":
            return basis
        return fit_basis(points, basis, patterns(num_bits, -1.0, basis), self.max_iterations)


def _greedy_basis(points: Points, num_bits: int) -> Tensor:
    rest, total = points.values, points.counts.sum(1, keepdim=True)
    basis = []
    for _ in range(num_bits):
        basis.append((points.counts * rest.abs()).sum(1, keepdim=True) / total)
        rest = rest - torch.where(rest >= 0, basis[-1], -basis[-1])
    return torch.cat(basis, 1)


def _greedy_codes(x: Tensor, basis: Tensor) -> Tensor:
    codes = torch.zeros_like(x)
    for i, coefficient in enumerate(torch.split(basis, 1, dim=1)):
        positive = x >= 0
        codes += positive * 2**i
        x = x - torch.where(positive, coefficient, -coefficient)
    return codes


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer sums of binary vectors."""
    return [BinaryCodeQuantizer]

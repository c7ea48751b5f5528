"""Keep the sign, times the mean magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, hookimpl
from qpipe.functional import scale_eps, straight_through


class BinaryQuantizer(Quantizer[Distribution]):
    """Levels ±mean|x|, the scale of least squared error for a sign; 0 counts as positive.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv 1603.05279, eq. 5 and 6 (BWN for weights alone).
    Equation: B = sign(W), α = ||W||_1 / n
    """

    name = "binary"
    needs = Histogram
    uses_range = False

    def check(self, spec: QuantSpec) -> None:
        """Refuse more than one bit."""
        if spec.num_bits != 1:
            raise RecipeError(
                f"quantizer 'binary' has 2 levels, not those of {spec.num_bits} bits; "
                f"set {spec.role.value}.num_bits=1"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Take the mean magnitude of each block."""
        scale = stats.expectation(torch.abs).clamp(min=scale_eps(1))
        return QParams(scale, torch.zeros_like(scale))

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return 1 where x is not negative."""
        return (x >= 0).to(x.dtype)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return ±scale."""
        return (2 * codes - 1) * qparams.scale

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes where |x| <= 1, as the paper has it."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        return straight_through(x.clamp(-1, 1), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are 0 and 1."""
        return 0


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer the sign."""
    return [BinaryQuantizer]

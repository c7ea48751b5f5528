"""Evenly spaced levels: what integer engines execute."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Statistics, hookimpl
from qpipe.functional import Rounding, affine_dequantize, affine_qparams, affine_quantize, fake_quantize


class UniformQuantizer(Quantizer[Statistics]):
    """Codes of 2 to 16 bits, real = scale * (code - zero_point).

    Args:
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest, half to even.

    Source: Jacob et al., 2017, arXiv 1712.05877, eq. 1.
    Equation: Q(x) = s (clamp(round(x / s) + z) - z)
    """

    name = "uniform"

    def __init__(self, rounding: Rounding = "nearest") -> None:
        self.rounding = rounding

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit scale and zero_point to the range, widened to hold zero."""
        return affine_qparams(stats.extremes() if range is None else range, spec)

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to codes."""
        return affine_quantize(x, qparams, spec, self.rounding)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the real values codes stand for."""
        return affine_dequantize(codes, qparams)

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels in four passes, and learn scale and zero_point where they require it."""
        return fake_quantize(x, qparams, spec, self.rounding)

    def check(self, spec: QuantSpec) -> None:
        """Raise RecipeError when the spec has no meaning for these levels."""
        if not 2 <= spec.num_bits <= 16:
            raise RecipeError(
                f"quantizer 'uniform' has 2 to 16 bits, not {spec.num_bits} ({spec.role}.num_bits)"
            )
        if spec.restricted and not spec.signed:
            raise RecipeError(
                f"restricted leaves out the least code of a signed range, but {spec.role}.signed=false; "
                "set one of them"
            )

    def is_affine(self, spec: QuantSpec) -> bool:
        """Always: integer engines execute these codes."""
        return True


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer the uniform quantizer."""
    return [UniformQuantizer]

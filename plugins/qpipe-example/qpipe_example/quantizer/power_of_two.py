"""Uniform levels whose scale is a power of two: rescaling is a shift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, Statistics, hookimpl
from qpipe.functional import affine_dequantize, affine_qparams, affine_quantize


class PowerOfTwoQuantizer(Quantizer[Statistics]):
    """Codes of a scale 2^k, the least that holds the range.

    Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of
    Deep Neural Networks", 2019, arXiv 1903.08066, section 3.
    """

    name = "power_of_two"

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit scale and zero_point, then round the scale up."""
        qparams = affine_qparams(stats.extremes() if range is None else range, spec)
        return replace(qparams, scale=qparams.scale.log2().ceil().exp2())

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to codes."""
        return affine_quantize(x, qparams, spec)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the real values codes stand for."""
        return affine_dequantize(codes, qparams)

    def is_affine(self, spec: QuantSpec) -> bool:
        """Always: integer engines execute these codes."""
        return True


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer the power-of-two quantizer."""
    return [PowerOfTwoQuantizer]

"""Round to signed powers of two and zero: multiplying by a level is a shift."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Statistics, hookimpl
from qpipe.functional import Rounding, round_codes, straight_through
from qpipe.levels import power_of_two
from qpipe_methods.quantizer._magnitude import bounded, join, largest, num_magnitudes, zero_code


class LogQuantizer(Quantizer[Statistics]):
    """Levels 0 and ±2^e, e = e_max - n + 1 .. e_max: n = 2^(b-1) - 1 of each sign, or 2^b - 1 of one.

    Code c - zero_point = ±i stands for ±2^(e_max - n + i), 0 for 0; the scale is 2^e_max, the power of two
    that the end of the range rounds to. Below half of the least level (in its domain) is 0.

    Args:
        domain: where values are rounded: 'log' has its boundaries at 2^(e + 1/2), 'linear' at 1.5 · 2^e.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016,
    arXiv 1603.01025, section 3 (log); Zhou et al., "Incremental Network Quantization", 2017,
    arXiv 1702.03044, eq. 4 (linear).
    Equation: e = round(log2 |x|) or the e of the nearest 2^e, clamped
    """

    name = "log"

    def __init__(self, domain: Literal["log", "linear"] = "log", rounding: Rounding = "nearest") -> None:
        if domain not in ("log", "linear"):
            raise RecipeError(f"quantizer.domain={domain} is unknown; use log or linear")
        self.domain = domain
        self.rounding = rounding

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Take for scale the power of two nearest to the end of the range."""
        exponent = self._exponent(largest(stats, range, spec)).round()
        return QParams(power_of_two(exponent), zero_code(stats, range, spec))

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return zero_point ± the index of the power of two nearest to |x|."""
        count = num_magnitudes(qparams, spec)
        ratio = x.abs() / qparams.scale
        least = power_of_two((1 - count).clamp(min=-126))  # float32 ends there
        index = self._exponent(ratio) + count
        if self.domain == "linear":
            index = torch.where(ratio < least, ratio / least, index)
        return join(x, round_codes(index, self.rounding).clamp(min=0).minimum(count), qparams, spec)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return ±2^(e_max - n + i)."""
        signed = codes - qparams.zero_point
        exponent = signed.abs() - num_magnitudes(qparams, spec)
        return torch.sign(signed) * power_of_two(exponent.clamp(min=-127)) * qparams.scale

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes up to the largest level."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        return straight_through(bounded(x, qparams.scale, qparams, spec), value)

    def _exponent(self, x: Tensor) -> Tensor:
        """Return a real number whose rounding is the exponent of the nearest power of two."""
        if self.domain == "log":
            return torch.log2(x)
        mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent, mantissa in [1/2, 1)
        return exponent + 2 * mantissa - 2


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer powers of two."""
    return [LogQuantizer]

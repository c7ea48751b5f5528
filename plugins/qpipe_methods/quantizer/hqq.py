"""Even levels whose zero is a real number, chosen so that outliers count less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, Role, hookimpl
from qpipe.functional import Rounding, round_codes, scale_eps, straight_through


class HQQQuantizer(Quantizer[Distribution]):
    """Half-quadratic quantization: no data, the scale is the range's, the zero minimizes an l_p norm, p < 1.

    Each block keeps the zero of least mean magnitude of the error, that of the range among them. The zero is
    no code, so 0 itself is no level and integer engines do not execute it.

    Args:
        p: of the norm, in (0, 1].
        beta: weight of the quadratic term that splits off the error; grows by kappa each step.
        kappa: growth of beta.
        steps: of the alternation; a block stops when its error grows.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
    Equation: W_e = shrink(W - Q(W)); z = mean(W_q - (W - W_e) / s)
    """

    name = "hqq"
    roles = frozenset({Role.WEIGHT})
    stand_in = {Role.ACTIVATION: "uniform"}  # noqa: RUF012
    needs = Histogram

    def __init__(
        self,
        p: float = 0.7,
        beta: float = 10.0,
        kappa: float = 1.01,
        steps: int = 20,
        rounding: Rounding = "nearest",
    ) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p is above 0 and at most 1, not {p}")
        self.p, self.beta, self.kappa, self.steps = p, beta, kappa, steps
        self.rounding = rounding

    def check(self, spec: QuantSpec) -> None:
        """Refuse codes that are centred on zero."""
        if spec.symmetric or spec.signed:
            raise RecipeError(
                "quantizer 'hqq' moves the zero, which symmetric and signed codes fix; set "
                f"{spec.role.value}.symmetric=false {spec.role.value}.signed=false "
                f"{spec.role.value}.restricted=false"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit the zero of each block to its values, the scale to its range."""
        ends = stats.extremes() if range is None else range
        scale = ((ends.high - ends.low) / spec.quant_max).clamp(min=scale_eps(spec.num_bits))
        start = -ends.low / scale
        zero = torch.cat(
            [self._zero(x, counts, scale[rows], start[rows], spec) for rows, x, counts in stats.points()]
        )
        return QParams(scale, torch.zeros_like(scale), {"zero": zero})

    def _zero(self, x: Tensor, counts: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        weight = counts.expand_as(x) / counts.expand_as(x).sum(1, keepdim=True)
        best, least = zero, torch.full_like(zero, torch.inf)
        running, beta = torch.ones_like(zero, dtype=torch.bool), self.beta
        for _ in range(self.steps):
            codes = (x / scale + zero).round_().clamp_(0, spec.quant_max)
            error = x - (codes - zero) * scale
            size = (error.abs() * weight).sum(1, keepdim=True)
            running = running & (size < least)
            best, least = torch.where(running, zero, best), torch.where(running, size, least)
            if not running.any():
                break
            zero = ((codes - (x - self._shrunk(error, beta)) / scale) * weight).sum(1, keepdim=True)
            beta *= self.kappa
        return best

    def _shrunk(self, error: Tensor, beta: float) -> Tensor:
        """Solve for the part of the error that the norm lets stand: generalized soft thresholding."""
        size = error.abs()
        return error.sign() * (size - size.pow(self.p - 1) / beta).relu()

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the index of the nearest level, from 0."""
        ratio = (x / qparams.scale + qparams.extra["zero"]).clamp(0, spec.quant_max)
        return round_codes(ratio, self.rounding)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return scale * (code - zero)."""
        return (codes - qparams.extra["zero"]) * qparams.scale

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes between the outer ones."""
        zero, scale = qparams.extra["zero"], qparams.scale
        inside = torch.minimum(torch.maximum(x, -zero * scale), (spec.quant_max - zero) * scale)
        return straight_through(inside, self.dequantize(self.quantize(x, qparams, spec), qparams, spec))


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer half-quadratic quantization."""
    return [HQQQuantizer]

"""Squash weights by tanh, then round them evenly between -1 and 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, Role, hookimpl
from qpipe.functional import Rounding, round_codes, scale_eps, straight_through
from qpipe_methods.quantizer._magnitude import largest


class DoReFaQuantizer(Quantizer[Distribution]):
    """Levels 2 c / (2^k - 1) - 1 for tanh-squashed weights; the sign times E|w| for one bit.

    The paper takes the largest tanh of a layer: granularity=layer. Its activations are the unsigned codes
    of the uniform quantizer over [0, 1], which is the stand-in for them.

    Args:
        rescale: multiply by the largest weight, so that the layer keeps its magnitude; false is the paper's
            [-1, 1], which only a network trained with it can bear.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Zhou et al., "DoReFa-Net", 2016, arXiv 1606.06160, eq. 7 to 10.
    Equation: w_q = 2 quantize_k(tanh w / (2 max|tanh w|) + 1/2) - 1
    """

    name = "dorefa"
    roles = frozenset({Role.WEIGHT})
    stand_in = {Role.ACTIVATION: "uniform"}  # noqa: RUF012
    needs = Histogram

    def __init__(self, rescale: bool = True, rounding: Rounding = "nearest") -> None:
        self.rescale = rescale
        self.rounding = rounding

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Keep the largest weight of each block, or the mean magnitude for one bit."""
        scale = stats.expectation(torch.abs) if spec.num_bits == 1 else largest(stats, range, spec)
        return QParams(scale.clamp(min=scale_eps(spec.num_bits)), torch.zeros_like(scale))

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return (2^k - 1) times the squashed weight in [0, 1], rounded."""
        if spec.num_bits == 1:
            return (x >= 0).to(x.dtype)
        place = self._squash(x, qparams) / 2 + 0.5
        return round_codes(place.clamp(0, 1) * (2.0**spec.num_bits - 1), self.rounding)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return 2 c / (2^k - 1) - 1, rescaled."""
        return (codes * (2 / (2.0**spec.num_bits - 1)) - 1) * self._factor(qparams, spec)

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes through tanh, not through the rounding."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        if spec.num_bits == 1:
            return straight_through(x, value)
        return straight_through(self._squash(x, qparams) * self._factor(qparams, spec), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes count the levels from 0."""
        return 0

    def _squash(self, x: Tensor, qparams: QParams) -> Tensor:
        return torch.tanh(x) / torch.tanh(qparams.scale)

    def _factor(self, qparams: QParams, spec: QuantSpec) -> Tensor:
        keep = self.rescale or spec.num_bits == 1
        return qparams.scale if keep else torch.ones_like(qparams.scale)


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer DoReFa's weights."""
    return [DoReFaQuantizer]

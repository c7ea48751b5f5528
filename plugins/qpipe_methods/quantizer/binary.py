"""Keep the sign, times the mean magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe import Distribution, Histogram, QParams, Quantizer, QuantSpec, Range, RecipeError, Role, hookimpl
from qpipe.functional import scale_eps, straight_through


class BinaryQuantizer(Quantizer[Distribution]):
    """Levels ±mean|x|, the scale of least squared error for a sign; 0 counts as positive.

    What lies behind a ReLU has one sign: `center` tells it apart by its mean (ReActNet learns the threshold).
    The gradient of activations passes where |x| <= 1; that of weights is the paper's, which knows that the
    scale moves with them: finetune.qat.ranges=moving, one block a filter.

    Args:
        center: levels mean ± mean|x - mean|, the sign being that of x - mean.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv 1603.05279, eq. 5, 6 and section 3.1 (BWN for weights
    alone); mask: Courbariaux et al., "Binarized Neural Networks", 2016, arXiv 1602.02830, eq. 4; center: Liu
    et al., "ReActNet", 2020, arXiv 2003.03488.
    Equation: B = sign(W), α = ||W||_1 / n; dW = g (1/n + α [|W| <= 1]), dx = g [|x| <= 1]
    """

    name = "binary"
    needs = Histogram
    uses_range = False

    def __init__(self, center: bool = False) -> None:
        self.center = center

    def check(self, spec: QuantSpec) -> None:
        """Refuse more than one bit."""
        if spec.num_bits != 1:
            raise RecipeError(
                f"quantizer 'binary' has 2 levels, not those of {spec.num_bits} bits; "
                f"set {spec.role.value}.num_bits=1, or another {spec.role.value}.quantizer"
            )

    def fit(self, stats: Distribution, range: Range | None, spec: QuantSpec) -> QParams:
        """Take the mean magnitude of each block, around its mean where it is centered."""
        extra = {"offset": stats.mean()} if self.center else {}
        scale = stats.deviation(extra["offset"]) if extra else stats.expectation(torch.abs)
        return QParams(scale.clamp(min=scale_eps(1)), torch.zeros_like(scale), extra)

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return 1 where x is not below the offset."""
        return (x >= _offset(qparams)).to(x.dtype)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return offset ± scale."""
        return (2 * codes - 1) * qparams.scale + _offset(qparams)

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient is that of the papers."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        passed = (x - _offset(qparams)).clamp(-1, 1)
        if spec.role is Role.WEIGHT:
            passed = qparams.scale * passed + x / x.shape[-1]
        return straight_through(passed, value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are 0 and 1."""
        return 0


def _offset(qparams: QParams) -> Tensor | float:
    return qparams.extra.get("offset", 0.0)


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer the sign."""
    return [BinaryQuantizer]

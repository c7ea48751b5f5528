"""The arithmetic of quantization, on blocks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qpipe.errors import RecipeError
from qpipe.types import QParams, QuantSpec, Range

Rounding = Literal["nearest", "stochastic"]


class _StraightThrough(torch.autograd.Function):
    """Return the second argument, send its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401  # autograd's own context
        return value.clone()  # a view made here could not be changed in place by the model

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return value with the gradient of x (Bengio et al., 2013, arXiv 1308.3432)."""
    result: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through."""
    return straight_through(x, x.round())


def round_codes(x: Tensor, rounding: Rounding) -> Tensor:
    """Round x to integers: to the nearest, half to even, or up with the probability of the fraction.

    Source: stochastic: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, 1502.02551.
    """
    if rounding == "nearest":
        return torch.round(x)
    below = torch.floor(x)  # x + rand would round past the end of the range
    return below + (torch.rand_like(x) < x - below)


def scale_eps(num_bits: int) -> float:
    """Return the least scale: float32's epsilon up to 8 bits, halved by each further bit.

    It keeps dead channels finite, and their int32 bias (in units of two scales) within int32.
    """
    return 2.0 ** -(15 + max(num_bits, 8))


def affine_qparams(range: Range, spec: QuantSpec) -> QParams:
    """Fit scale and zero_point to a range, widened to hold zero exactly.

    A full symmetric range takes the survey's scale, 2 amax / (2^b - 1), so both ends clip by at most half a
    step; a restricted one takes amax / (2^(b-1) - 1).

    Args:
        range: [B, R], units of x.
        spec: a symmetric unsigned one needs a range without negative values.

    Returns:
        scale [B, R], units of x per code, at least scale_eps; zero_point [B, R], codes, 0 if symmetric.

    Raises:
        RecipeError: negative values for symmetric unsigned codes.

    Source: Jacob et al., 2017, arXiv 1712.05877, eq. 1; Gholami et al., 2021, arXiv 2103.13630, III-B.
    """
    low, high = range.low.clamp(max=0), range.high.clamp(min=0)
    if spec.symmetric and not spec.signed and bool((low < 0).any()):
        raise RecipeError(
            f"symmetric unsigned codes cannot hold negative values (least: {low.min().item():.4g}); "
            "use signed=true or symmetric=false"
        )
    width = high - low
    if spec.symmetric and spec.signed:
        width = 2 * torch.maximum(-low, high)
    scale = (width / (spec.quant_max - spec.quant_min)).clamp(min=scale_eps(spec.num_bits))
    if spec.symmetric:
        return QParams(scale, torch.zeros_like(scale))
    zero_point = (spec.quant_min - low / scale).round().clamp(spec.quant_min, spec.quant_max)
    return QParams(scale, zero_point)


def affine_quantize(x: Tensor, qparams: QParams, spec: QuantSpec, rounding: Rounding = "nearest") -> Tensor:
    """Return codes: round(x / scale) + zero_point within the code range, integers in x's dtype."""
    if rounding == "stochastic":
        return round_codes(_clamped_ratio(x, qparams, spec), rounding).add_(qparams.zero_point)
    return _round_ratio(x, qparams.scale, qparams.zero_point, spec).add_(qparams.zero_point)


def affine_dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Return scale * (codes - zero_point)."""
    return (codes - qparams.zero_point).mul_(qparams.scale)


def _round_ratio(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    ratio = torch.div(x, scale)
    return ratio.clamp_(spec.quant_min - zero_point, spec.quant_max - zero_point).round_()


def _clamped_ratio(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    low, high = spec.quant_min - qparams.zero_point, spec.quant_max - qparams.zero_point
    return torch.clamp(x / qparams.scale, low, high)


class _FakeQuantize(torch.autograd.Function):
    """Clamp then round; the mask tests the raw ratio (LSQ's convention)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return _round_ratio(x, scale, zero_point, spec).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, scale, zero_point = ctx.saved_tensors
        grad, spec = grads[0], ctx.spec
        ratio = x / scale
        codes = ratio.clamp(spec.quant_min - zero_point, spec.quant_max - zero_point)
        inside = (ratio == codes).to(x.dtype)  # to multiply: several times faster than masked_fill
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:  # LSQ, eq. 3: round(v/s) - v/s inside, the bound outside
            slope = torch.addcmul(codes.round(), codes, inside, value=-1)
            grad_scale = (grad * slope).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero_point = (grad * scale * (inside - 1)).sum_to_size(zero_point.shape)
        return grad * inside, grad_scale, grad_zero_point, None


def fake_quantize(x: Tensor, qparams: QParams, spec: QuantSpec, rounding: Rounding = "nearest") -> Tensor:
    """Round x to its levels; scale and zero_point broadcast over x, whatever the granularity.

    Gradients: x where the raw ratio lies within the code range; scale as LSQ has it; zero_point (an integer)
    -scale outside the range, 0 inside.

    Source: Esser et al., 2019, arXiv 1902.08153, eq. 3.
    """
    scale, zero_point = qparams.scale, qparams.zero_point
    if rounding == "stochastic":  # autograd has the same gradients: codes - ratio for the scale
        ratio = _clamped_ratio(x, qparams, spec)
        return straight_through(ratio, round_codes(ratio.detach(), rounding)) * scale
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, scale, zero_point, spec)  # type: ignore[no-untyped-call]
        return result
    return _round_ratio(x, scale, zero_point, spec).mul_(scale)


class _ScaledGradient(torch.autograd.Function):
    """Return the first argument, multiply its gradient by the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # noqa: ANN401
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grads[0] * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x; its gradient is multiplied by factor."""
    result: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result

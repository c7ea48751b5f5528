from __future__ import annotations

import pytest
import torch

from qpipe import QParams, QuantSpec, Range, RecipeError
from qpipe.functional import (
    affine_qparams,
    affine_quantize,
    fake_quantize,
    round_codes,
    round_ste,
    scale_eps,
)


def ranged(low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    qparams = affine_qparams(Range(torch.tensor([[low]]), torch.tensor([[high]])), spec)
    return qparams.scale.item(), qparams.zero_point.item()


def test_symmetric_scales() -> None:
    """METHODS.md A: full 2 amax / (2^b - 1), restricted amax / (2^(b-1) - 1)."""
    assert ranged(-1, 3, QuantSpec(8)) == (pytest.approx(6 / 255), 0)
    assert ranged(-3, 1, QuantSpec(8, restricted=True)) == (pytest.approx(3 / 127), 0)
    assert ranged(0, 3, QuantSpec(8, signed=False)) == (pytest.approx(3 / 255), 0)


def test_asymmetric_range_is_widened_to_hold_zero() -> None:
    assert ranged(-1, 3, QuantSpec(8, False, False)) == (pytest.approx(4 / 255), 64)
    assert ranged(2, 3, QuantSpec(8, False, False)) == (pytest.approx(3 / 255), 0)
    assert ranged(-3, -2, QuantSpec(8, False, False)) == (pytest.approx(3 / 255), 255)
    assert ranged(-1, 3, QuantSpec(8, False, True)) == (pytest.approx(4 / 255), -64)


def test_an_empty_range_has_the_least_scale() -> None:
    assert ranged(0, 0, QuantSpec(8)) == (torch.finfo(torch.float32).eps, 0)
    assert ranged(0, 0, QuantSpec(16, False, False))[0] == scale_eps(16) == 2.0**-31


def test_symmetric_unsigned_codes_refuse_negative_values() -> None:
    with pytest.raises(RecipeError, match="cannot hold negative values"):
        ranged(-1, 3, QuantSpec(8, signed=False))


def test_rounds_half_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    codes = affine_quantize(x, QParams(torch.ones(1, 1), torch.zeros(1, 1)), QuantSpec(8))
    assert codes.tolist() == [[0, 2, 2, 0, -2]]


def lsq_gradient(
    ratio: float, spec: QuantSpec, zero_point: float = 0, scale: float = 0.5
) -> tuple[float, ...]:
    """Gradients by x, scale and zero_point of one value at x / scale = ratio."""
    x = torch.tensor([[ratio * scale]], requires_grad=True)
    qparams = QParams(
        torch.tensor([[scale]], requires_grad=True), torch.tensor([[float(zero_point)]], requires_grad=True)
    )
    fake_quantize(x, qparams, spec).sum().backward()
    return tuple(t.grad.item() for t in (x, qparams.scale, qparams.zero_point))


def test_gradients_are_those_of_lsq() -> None:
    """METHODS.md C: v/s = 3.7 gives 0.3, a level 0, beyond the range the bound."""
    spec = QuantSpec(4)
    assert lsq_gradient(3.7, spec) == (1, pytest.approx(0.3, abs=1e-5), 0)
    assert lsq_gradient(3, spec) == (1, 0, 0)
    assert lsq_gradient(9, spec) == (0, 7, -0.5)
    assert lsq_gradient(-9, spec) == (0, -8, -0.5)
    assert lsq_gradient(9, QuantSpec(4, False, False), zero_point=8) == (0, 7, -0.5)
    assert lsq_gradient(-8.5, QuantSpec(4, False, False), zero_point=8) == (0, -8, -0.5)


def test_the_mask_tests_the_raw_ratio() -> None:
    """Torch's native op tests the rounded value: at x/s = 127.4 its gradient is 1, ours 0."""
    assert lsq_gradient(127.4, QuantSpec(8))[0] == 0
    assert lsq_gradient(127.0, QuantSpec(8))[0] == 1
    assert lsq_gradient(-128.0, QuantSpec(8))[0] == 1


def test_agrees_with_torch_inside_the_range() -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    qparams = QParams(torch.full((1, 1), 0.05), torch.full((1, 1), 128.0))
    ours = fake_quantize(x, qparams, QuantSpec(8, False, False))
    native = torch.fake_quantize_per_tensor_affine(x, 0.05, 128, 0, 255)
    torch.testing.assert_close(ours, native)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    (native_grad,) = torch.autograd.grad(native.sum(), x)
    assert torch.equal(grad, native_grad)


def test_scale_gradient_is_reduced_to_its_blocks() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    scale = torch.full((3, 1), 0.1, requires_grad=True)
    fake_quantize(x, QParams(scale, torch.zeros(3, 1)), QuantSpec(4)).sum().backward()
    ratio = x / 0.1
    inside = (ratio >= -8) & (ratio <= 7)
    want = torch.where(inside, ratio.round() - ratio, ratio.clamp(-8, 7)).sum(1, keepdim=True)
    torch.testing.assert_close(scale.grad, want)


def test_inference_and_training_see_the_same_values() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    qparams = QParams(torch.full((3, 1), 0.1), torch.zeros(3, 1))
    with torch.no_grad():
        plain = fake_quantize(x, qparams, QuantSpec(4))
    assert torch.equal(fake_quantize(x.requires_grad_(), qparams, QuantSpec(4)), plain)


def test_round_ste_passes_the_gradient() -> None:
    x = torch.tensor([0.4, 2.5], requires_grad=True)
    y = round_ste(x)
    y.sum().backward()
    assert y.tolist() == [0, 2]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


def test_codes_are_rounded_half_to_even() -> None:
    assert round_codes(torch.tensor([0.5, 1.5, 2.5, -0.5]), "nearest").tolist() == [0, 2, 2, 0]

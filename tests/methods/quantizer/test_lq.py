"""LQ-Nets' basis: closed form for one bit, Lloyd-Max for two, least squares by brute force."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.lq import LQQuantizer

from qpipe import QuantSpec, Role, Samples
from qpipe.testing import QuantizerContract

WEIGHT = QuantSpec(num_bits=2, symmetric=True, role=Role.WEIGHT)


class TestLQWeights(QuantizerContract):
    quantizer = LQQuantizer()
    spec = WEIGHT
    holds_zero = False


class TestLQActivations(QuantizerContract):
    quantizer = LQQuantizer()
    spec = QuantSpec(num_bits=2, symmetric=False, signed=False)


def test_one_bit_is_the_mean_magnitude() -> None:
    """K = 1: v = mean|x|, XNOR-Net's scale (METHODS B)."""
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) + 0.2
    spec = QuantSpec(num_bits=1, role=Role.WEIGHT)
    basis = LQQuantizer().fit(Samples(x), None, spec).extra["basis"]
    torch.testing.assert_close(basis, x.abs().mean(1, keepdim=True))


def test_two_bits_of_a_gaussian_are_lloyd_max() -> None:
    """±v1 ± v2 is any symmetric set of four levels: 0.9816, 0.5288 and Max's error (METHODS B)."""
    x = torch.special.ndtri((torch.arange(100_000) + 0.5).double() / 100_000).float().unsqueeze(0)
    qparams = LQQuantizer(500).fit(Samples(x), None, WEIGHT)
    basis = qparams.extra["basis"][0].sort(descending=True).values
    torch.testing.assert_close(basis, torch.tensor([0.9816, 0.5288]), rtol=0, atol=1e-3)
    error = (LQQuantizer().fake_quantize(x, qparams, WEIGHT) - x).double().square().mean().item()
    assert error == pytest.approx(0.117482, abs=1e-4)


@pytest.mark.parametrize(("role", "off"), [(Role.WEIGHT, -1.0), (Role.ACTIVATION, 0.0)])
def test_the_basis_is_the_least_squares_fit_of_its_codes(role: Role, off: float) -> None:
    """V = (B B^T)^-1 B x by torch.linalg.lstsq; levels are nearest; bits are -1, 1 or 0, 1."""
    spec = QuantSpec(num_bits=3, role=role)
    x = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    if role is Role.ACTIVATION:
        x = x.clamp(min=0)
    quantizer = LQQuantizer(1000)
    qparams = quantizer.fit(Samples(x), None, spec)
    codes = quantizer.quantize(x, qparams, spec).long()
    bits = torch.where((codes.unsqueeze(-1) >> torch.arange(3) & 1) > 0, 1.0, off)
    basis = torch.linalg.lstsq(bits, x.unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close(qparams.extra["basis"], basis, rtol=1e-3, atol=1e-3)
    levels = quantizer.dequantize(torch.arange(8.0).expand(4, -1), qparams, spec)
    nearest = (x.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    error = (quantizer.fake_quantize(x, qparams, spec) - x).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)


def test_activations_below_zero_are_held() -> None:
    """The highest bit may count down: a symmetric input is not cut at zero."""
    spec = QuantSpec(num_bits=4, symmetric=False, signed=False)
    x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    value = LQQuantizer().fake_quantize(x, LQQuantizer().fit(Samples(x), None, spec), spec)
    assert (value - x).square().mean() < 0.02


def test_the_gradient_passes_between_the_outer_levels() -> None:
    quantizer, spec = (
        LQQuantizer(),
        QuantSpec(num_bits=2, symmetric=False, signed=False, role=Role.ACTIVATION),
    )
    qparams = quantizer.fit(Samples(torch.tensor([[0.0, 1.0, 2.0, 3.0]])), None, spec)
    x = torch.tensor([[-1.0, 0.4, 2.6, 4.0]], requires_grad=True)
    quantizer.fake_quantize(x, qparams, spec).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]


def test_the_gradient_of_weights_is_never_cut() -> None:
    """Section 3.3: eq. 11 cuts it for activations, weights are trained straight through."""
    qparams = LQQuantizer().fit(Samples(torch.tensor([[-3.0, -1.0, 1.0, 3.0]])), None, WEIGHT)
    x = torch.tensor([[-9.0, 0.4, 9.0]], requires_grad=True)
    LQQuantizer().fake_quantize(x, qparams, WEIGHT).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1]]

"""Sums of binary vectors: greedy constants of a Gaussian, and least squares by brute force."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.binary_code import BinaryCodeQuantizer
from torch import Tensor

from qpipe import QuantSpec, Samples
from qpipe.testing import QuantizerContract


class TestBinaryCode(QuantizerContract):
    quantizer = BinaryCodeQuantizer()
    bits = (1, 2, 3, 4)
    spec = QuantSpec(num_bits=3)
    holds_zero = False


def gaussian(size: int = 100_000) -> Tensor:
    """Return the quantiles of a standard normal, [1, size]."""
    return torch.special.ndtri((torch.arange(size) + 0.5).double() / size).float().unsqueeze(0)


@pytest.mark.parametrize(("num_bits", "mse"), [(1, 0.36338), (2, 0.130454), (3, 0.058393), (4, 0.032897)])
def test_greedy_on_a_gaussian(num_bits: int, mse: float) -> None:
    """A = 0.79788, 0.48262, 0.26844, 0.15967 and their errors (METHODS B)."""
    spec, quantizer = QuantSpec(num_bits=num_bits), BinaryCodeQuantizer("greedy")
    qparams = quantizer.fit(Samples(gaussian()), None, spec)
    expected = torch.tensor([0.79788, 0.48262, 0.26844, 0.15967])[:num_bits]
    torch.testing.assert_close(qparams.extra["basis"][0], expected, rtol=0, atol=2e-4)
    error = (quantizer.fake_quantize(gaussian(), qparams, spec) - gaussian()).double().square().mean().item()
    assert error == pytest.approx(mse, abs=1e-4)


def test_each_greedy_step_lowers_the_error_by_n_times_its_square() -> None:
    """||r||² falls by exactly n a_i² (Network Sketching)."""
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).exp() - 1
    quantizer = BinaryCodeQuantizer("greedy")
    before = x.square().sum(1)
    for num_bits in (1, 2, 3):
        spec = QuantSpec(num_bits=num_bits)
        qparams = quantizer.fit(Samples(x), None, spec)
        after = (quantizer.fake_quantize(x, qparams, spec) - x).square().sum(1)
        drop = 400 * qparams.extra["basis"][:, -1].square()
        torch.testing.assert_close(before - after, drop, rtol=1e-3, atol=1e-3)
        before = after


def test_two_alternating_bits_of_a_gaussian_are_lloyd_max() -> None:
    """±a1 ± a2 is any symmetric set of four levels: a = 0.9816, 0.5288 and Max's error 0.117482."""
    spec, quantizer = QuantSpec(num_bits=2), BinaryCodeQuantizer("alternating", max_iterations=200)
    qparams = quantizer.fit(Samples(gaussian()), None, spec)
    torch.testing.assert_close(qparams.extra["basis"][0], torch.tensor([0.9816, 0.5288]), rtol=0, atol=1e-3)
    error = (quantizer.fake_quantize(gaussian(), qparams, spec) - gaussian()).double().square().mean().item()
    assert error == pytest.approx(0.117482, abs=1e-4)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_alternating_is_a_fixed_point_and_no_worse_than_greedy(num_bits: int) -> None:
    """Codes are nearest sums (brute force) and the basis is their least-squares fit (torch.linalg.lstsq)."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(num_bits=num_bits)
    errors = {}
    for method in ("greedy", "alternating"):
        quantizer = BinaryCodeQuantizer(method, max_iterations=500)
        qparams = quantizer.fit(Samples(x), None, spec)
        codes = quantizer.quantize(x, qparams, spec)
        value = quantizer.fake_quantize(x, qparams, spec)
        errors[method] = (value - x).square().sum(1)
    assert (errors["alternating"] <= errors["greedy"]).all()
    signs = (codes.long().unsqueeze(-1) >> torch.arange(num_bits) & 1) * 2.0 - 1
    basis = torch.linalg.lstsq(signs, x.unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close(qparams.extra["basis"], basis, rtol=1e-3, atol=1e-4)
    levels = quantizer.dequantize(torch.arange(2.0**num_bits).expand(4, -1), qparams, spec)
    nearest = (x.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((value - x).abs(), nearest, rtol=0, atol=1e-6)

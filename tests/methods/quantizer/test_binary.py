"""The sign times the mean magnitude: closed forms of its error."""

from __future__ import annotations

import math

import pytest
import torch
from qpipe_methods.quantizer.binary import BinaryQuantizer

from qpipe import QParams, QuantSpec, RecipeError, Role, Samples
from qpipe.testing import QuantizerContract

SPEC = QuantSpec(num_bits=1)


class TestBinary(QuantizerContract):
    quantizer = BinaryQuantizer()
    spec = QuantSpec(num_bits=1)
    bits = (1,)
    holds_zero = False


class TestCenteredBinary(TestBinary):
    quantizer = BinaryQuantizer(center=True)


def test_the_error_is_the_energy_less_n_times_the_squared_scale() -> None:
    """||W - αB||² = ||W||² - n α² (XNOR-Net)."""
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) + 0.3
    qparams = BinaryQuantizer().fit(Samples(x), None, SPEC)
    error = (BinaryQuantizer().fake_quantize(x, qparams, SPEC) - x).square().sum(1)
    expected = x.square().sum(1) - 1000 * x.abs().mean(1).square()
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)


def test_a_gaussian_loses_one_minus_two_over_pi() -> None:
    x = torch.special.ndtri((torch.arange(100_001) + 0.5) / 100_001).unsqueeze(0)
    qparams = BinaryQuantizer().fit(Samples(x), None, SPEC)
    assert qparams.scale.item() == pytest.approx(0.79788, abs=1e-4)
    error = (BinaryQuantizer().fake_quantize(x, qparams, SPEC) - x).square().mean().item()
    assert error == pytest.approx(1 - 2 / math.pi, abs=2e-4)


def test_codes_are_signs_and_the_gradient_stops_beyond_one() -> None:
    x = torch.tensor([[-1.5, -0.5, 0.0, 0.5, 1.5]], requires_grad=True)
    qparams = QParams(torch.full((1, 1), 0.8), torch.zeros(1, 1))
    assert BinaryQuantizer().quantize(x, qparams, SPEC).tolist() == [[0, 0, 1, 1, 1]]
    BinaryQuantizer().fake_quantize(x, qparams, SPEC).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_the_gradient_of_weights_is_xnor_nets() -> None:
    """Section 3.1: dW = g (1/n + α [|W| <= 1])."""
    x = torch.tensor([[-1.5, -0.5, 0.0, 0.5, 1.5]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    qparams = QParams(torch.full((1, 1), 0.8), torch.zeros(1, 1))
    spec = QuantSpec(num_bits=1, role=Role.WEIGHT)
    (BinaryQuantizer().fake_quantize(x, qparams, spec) * upstream).sum().backward()
    assert x.grad is not None
    expected = [1 / 5, 2 * (1 / 5 + 0.8), 3 * (1 / 5 + 0.8), 4 * (1 / 5 + 0.8), 5 / 5]
    assert x.grad.flatten().tolist() == pytest.approx(expected)


def test_centered_levels_tell_apart_what_has_one_sign() -> None:
    """A uniform distribution on [0, 4]: mean 2, E|x - 2| = 1, error 4²/12 - 1² = 1/3; mask |x - 2| <= 1."""
    x = ((torch.arange(4000) + 0.5) / 1000).unsqueeze(0).requires_grad_()
    quantizer = BinaryQuantizer(center=True)
    y = quantizer.fake_quantize(x, quantizer.fit(Samples(x.detach()), None, SPEC), SPEC)
    assert y.detach().unique().tolist() == pytest.approx([1, 3], abs=1e-4)
    assert (y - x).square().mean().item() == pytest.approx(1 / 3, rel=1e-3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.sum().item() == pytest.approx(2000, abs=2)


def test_other_widths_are_refused() -> None:
    with pytest.raises(RecipeError, match="num_bits=1"):
        BinaryQuantizer().check(QuantSpec(num_bits=2))

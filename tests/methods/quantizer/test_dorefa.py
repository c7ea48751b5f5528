"""DoReFa's weights against its equations, written out."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.dorefa import DoReFaQuantizer

from qpipe import QuantSpec, Role
from qpipe.testing import QuantizerContract, fit

SPEC = QuantSpec(num_bits=3, symmetric=True, role=Role.WEIGHT)


class TestDoReFa(QuantizerContract):
    quantizer = DoReFaQuantizer()
    spec = SPEC
    bits = (2, 3, 4, 8)
    holds_zero = False

    def test_levels_stay_where_they_are(self) -> None:
        """Not here: the levels are squashed again, which the paper's rule does to any weight."""

    def test_error_falls_as_bits_grow(self) -> None:
        """Not here: the distance to tanh does not fall with bits; see test_codes_follow_the_equation."""


@pytest.mark.parametrize("num_bits", [2, 3, 8])
def test_codes_follow_the_equation(num_bits: int) -> None:
    """w_q = 2 round((2^k - 1)(tanh w / (2 max|tanh w|) + 1/2)) / (2^k - 1) - 1, which reaches -1 or 1."""
    x = torch.randn(2, 999, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(num_bits=num_bits, role=Role.WEIGHT)
    quantizer = DoReFaQuantizer(rescale=False)
    value = quantizer.fake_quantize(x, fit(quantizer, x, spec), spec)
    levels = 2**num_bits - 1
    squashed = torch.tanh(x.double()) / (2 * torch.tanh(x.double()).abs().amax(1, keepdim=True)) + 0.5
    expected = 2 * torch.round(levels * squashed) / levels - 1
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(value.abs().amax(1), torch.ones(2))


def test_rescaling_keeps_the_largest_weight() -> None:
    x = torch.randn(2, 999, generator=torch.Generator().manual_seed(0)) * 0.05
    plain, rescaled = DoReFaQuantizer(rescale=False), DoReFaQuantizer()
    largest = x.abs().amax(1, keepdim=True)
    expected = plain.fake_quantize(x, fit(plain, x, SPEC), SPEC) * largest
    torch.testing.assert_close(rescaled.fake_quantize(x, fit(rescaled, x, SPEC), SPEC), expected)


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    """Eq. 8; for any other width eq. 9."""
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(num_bits=1, role=Role.WEIGHT)
    quantizer = DoReFaQuantizer(rescale=False)
    expected = torch.where(x >= 0, 1, -1) * x.abs().mean(1, keepdim=True)
    torch.testing.assert_close(quantizer.fake_quantize(x, fit(quantizer, x, spec), spec), expected)


def test_the_gradient_is_that_of_tanh() -> None:
    """D w_q / d w = (1 - tanh² w) / max|tanh w|: the rounding passes it on."""
    x = torch.tensor([[-1.0, 0.2, 0.7]], requires_grad=True)
    quantizer = DoReFaQuantizer(rescale=False)
    quantizer.fake_quantize(x, fit(quantizer, x.detach(), SPEC), SPEC).sum().backward()
    tanh = torch.tanh(x.detach())
    torch.testing.assert_close(x.grad, (1 - tanh.square()) / tanh.abs().max())

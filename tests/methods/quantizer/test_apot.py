"""Additive powers of two: the paper's level sets and brute-force nearest levels."""

from __future__ import annotations

import torch
from qpipe_methods.quantizer.apot import APoTQuantizer, apot_levels

from qpipe import QParams, QuantSpec, Samples
from qpipe.testing import QuantizerContract


class TestAPoT(QuantizerContract):
    quantizer = APoTQuantizer()


class TestAPoTUnsigned(QuantizerContract):
    quantizer = APoTQuantizer()
    spec = QuantSpec(num_bits=4, symmetric=False, signed=False)


def test_unsigned_four_bits_have_the_papers_levels() -> None:
    """K = 2, n = 2: levels x 48 (METHODS B)."""
    levels = [round(48 * level, 9) for level in apot_levels(4, 2)]
    assert levels == [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]


def test_levels_are_distinct_at_every_width_and_one_term_is_powers_of_two() -> None:
    assert [len({*apot_levels(bits, 2)}) for bits in range(1, 9)] == [2**bits for bits in range(1, 9)]
    assert apot_levels(3, 3) == (0.0, *(2.0**-e for e in range(6, -1, -1)))


def test_three_magnitude_bits_follow_the_authors_code() -> None:
    """{0, 1/2, 1/4, 1/16} + {0, 1/8}, over 5/8: what signed 4-bit weights get."""
    sums = sorted(a + b for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8))
    assert apot_levels(3, 2) == tuple(s / (5 / 8) for s in sums)


def test_codes_are_the_nearest_levels() -> None:
    """Brute force, signed and unsigned, with and without negative values."""
    quantizer = APoTQuantizer()
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    x[1].abs_()
    for spec, tables in (
        (QuantSpec(num_bits=5, symmetric=True), [apot_levels(4, 2)] * 2),
        (QuantSpec(num_bits=5, symmetric=False, signed=False), [apot_levels(4, 2), apot_levels(5, 2)]),
    ):
        qparams = quantizer.fit(Samples(x), None, spec)
        value = quantizer.dequantize(quantizer.quantize(x, qparams, spec), qparams, spec)
        assert torch.equal(value, quantizer.fake_quantize(x, qparams, spec))
        for row in range(2):
            positive = torch.tensor(tables[row]) * x[row].abs().max()
            levels = torch.cat([-positive, positive])
            nearest = (x[row].unsqueeze(1) - levels).abs().amin(1)
            torch.testing.assert_close((value[row] - x[row]).abs(), nearest, rtol=1e-6, atol=1e-6)


def test_stochastic_rounding_is_unbiased_between_uneven_levels() -> None:
    spec = QuantSpec(num_bits=4, symmetric=True)
    x = torch.full((1, 200_000), 0.75)
    x[0, 0] = 1.0  # the largest level; 0.75 lies between 0.6 and 0.8
    quantizer = APoTQuantizer(rounding="stochastic")
    torch.manual_seed(0)
    value = quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec)
    torch.testing.assert_close(value[0, 1:].unique(), torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(value[0, 1:].mean(), torch.tensor(0.75), rtol=0, atol=1e-3)


def test_the_gradient_passes_up_to_the_largest_level_and_below_zero_only_where_codes_are_negative() -> None:
    x = torch.tensor([[-1.2, -0.3, 0.7, 1.2]]).repeat(2, 1).requires_grad_()
    quantizer = APoTQuantizer()
    one_sided = QParams(torch.ones(2, 1), torch.tensor([[0.0], [8.0]]))  # no negative code; half of them
    quantizer.fake_quantize(x, one_sided, QuantSpec(4, symmetric=False, signed=False)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 1, 0], [0, 1, 1, 0]]

"""Powers of two: levels, boundaries and relative error against the closed forms."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from qpipe_methods.quantizer.log import LogQuantizer
from torch import Tensor

from qpipe import QParams, QuantSpec, RecipeError, Samples
from qpipe.testing import QuantizerContract

SIGNED = QuantSpec(num_bits=4, symmetric=True, signed=True)


class TestLog(QuantizerContract):
    quantizer = LogQuantizer()
    bits = (2, 3, 4)  # from 5 on only magnitudes that hardly occur are added


class TestLogLinear(QuantizerContract):
    quantizer = LogQuantizer("linear")
    bits = (2, 3, 4)


class TestLogUnsigned(QuantizerContract):
    quantizer = LogQuantizer()
    spec = QuantSpec(num_bits=8, symmetric=False, signed=False)
    bits = (3, 8)


def fit(quantizer: LogQuantizer, x: Tensor, spec: QuantSpec) -> QParams:
    return quantizer.fit(Samples(x), None, spec)


def test_levels_are_zero_and_signed_powers_of_two() -> None:
    """4 bits: 0 and ±2^e, e = -6 .. 0 for a largest magnitude of 1: 15 levels."""
    x = torch.linspace(-1, 1, 10_001).unsqueeze(0)
    quantizer = LogQuantizer()
    levels = quantizer.fake_quantize(x, fit(quantizer, x, SIGNED), SIGNED).unique().tolist()
    powers = [2.0**-e for e in range(7)]
    assert levels == sorted([0.0, *powers, *(-p for p in powers)])


@pytest.mark.parametrize(
    ("domain", "bound", "boundary"), [("log", math.sqrt(2) - 1, math.sqrt(2)), ("linear", 1 / 3, 1.5)]
)
def test_relative_error_is_bounded_and_reached(
    domain: Literal["log", "linear"], bound: float, boundary: float
) -> None:
    """Log domain errs by at most sqrt(2) - 1 of x, linear by at most 1/3; just above the boundary goes up."""
    spec = QuantSpec(num_bits=6, symmetric=True)
    quantizer = LogQuantizer(domain)
    x = torch.logspace(-8, 0, 200_001, base=2).unsqueeze(0)
    value = quantizer.fake_quantize(x, fit(quantizer, x, spec), spec)
    error = ((value - x).abs() / x).max().item()
    assert error == pytest.approx(bound, abs=1e-3)
    near = torch.tensor([[boundary / 8 * 0.999, boundary / 8 * 1.001, 1.0]])
    assert quantizer.fake_quantize(near, fit(quantizer, near, spec), spec).tolist() == [[0.125, 0.25, 1.0]]


def test_linear_domain_is_the_nearest_level() -> None:
    """Brute force over all levels, those next to zero included."""
    quantizer = LogQuantizer("linear")
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    qparams = fit(quantizer, x, SIGNED)
    codes = torch.arange(-7.0, 8).expand(3, -1)
    levels = quantizer.dequantize(codes, qparams, SIGNED)
    distance = (x.unsqueeze(-1) - levels.unsqueeze(1)).abs()
    error = (quantizer.fake_quantize(x, qparams, SIGNED) - x).abs()
    torch.testing.assert_close(error, distance.amin(-1), rtol=0, atol=0)


def test_unsigned_codes_spend_all_bits_on_positive_data_and_half_on_mixed() -> None:
    """4 bits: 15 magnitudes above 0 where nothing is negative, 7 on either side otherwise."""
    spec = QuantSpec(num_bits=4, symmetric=False, signed=False)
    quantizer = LogQuantizer()
    x = torch.stack([torch.logspace(-20, 0, 4001, base=2), torch.linspace(-1, 1, 4001)])
    qparams = fit(quantizer, x, spec)
    codes = quantizer.quantize(x, qparams, spec)
    assert qparams.zero_point.flatten().tolist() == [0, 8]
    assert [codes[0].min().item(), codes[0].max().item()] == [0, 15]
    assert [codes[1].min().item(), codes[1].max().item()] == [1, 15]
    assert quantizer.dequantize(torch.tensor([[1.0], [8.0]]), qparams, spec).flatten().tolist() == [
        2.0**-14,
        0,
    ]


def test_a_level_is_kept_and_eight_bits_reach_float32() -> None:
    spec = QuantSpec(num_bits=8, symmetric=True)
    quantizer = LogQuantizer()
    x = torch.tensor([[1.0, -0.5, 2.0**-60, 0.0, 2.0**-126]])
    assert torch.equal(quantizer.fake_quantize(x, fit(quantizer, x, spec), spec), x)


def test_the_gradient_passes_up_to_the_largest_level() -> None:
    quantizer = LogQuantizer()
    qparams = QParams(torch.ones(1, 1), torch.zeros(1, 1))
    x = torch.tensor([[-1.2, -0.3, 0.0, 0.7, 1.2]], requires_grad=True)
    quantizer.fake_quantize(x, qparams, SIGNED).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_stochastic_rounding_of_the_linear_domain_is_unbiased_and_seeded() -> None:
    """Between 1/2 and 1 the mean is x; its variance is (x - 1/2)(1 - x)."""
    spec = QuantSpec(num_bits=4, symmetric=True)
    quantizer = LogQuantizer("linear", rounding="stochastic")
    qparams = QParams(torch.ones(1, 1), torch.zeros(1, 1))
    x = torch.full((1, 200_000), 0.6)
    torch.manual_seed(0)
    value = quantizer.fake_quantize(x, qparams, spec)
    assert value.mean().item() == pytest.approx(0.6, abs=2e-3)
    assert value.var().item() == pytest.approx(0.1 * 0.4, abs=1e-3)
    torch.manual_seed(0)
    assert torch.equal(value, quantizer.fake_quantize(x, qparams, spec))
    assert quantizer.settled().fake_quantize(x, qparams, spec).unique().tolist() == [0.5]


def test_symmetric_unsigned_codes_refuse_negative_values() -> None:
    spec = QuantSpec(num_bits=4, symmetric=True, signed=False)
    with pytest.raises(RecipeError, match="negative values"):
        fit(LogQuantizer(), torch.tensor([[-1.0, 1.0]]), spec)


@pytest.mark.parametrize(("largest", "scale"), [(0.7, 0.5), (0.71, 1.0), (1.4, 1.0), (3.0, 4.0)])
def test_the_scale_is_the_power_of_two_nearest_in_the_log(largest: float, scale: float) -> None:
    """The boundary lies at the geometric mean, 1 / sqrt 2 of the upper one."""
    qparams = LogQuantizer().fit(Samples(torch.tensor([[-largest, 0.1]])), None, SIGNED)
    assert qparams.scale.item() == scale

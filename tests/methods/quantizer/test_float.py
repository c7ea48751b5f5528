"""Minifloats against an independent implementation of their bits, and the facts of MX and NVFP4."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from qpipe_methods.quantizer.float import FloatQuantizer

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Role, Samples
from qpipe.testing import QuantizerContract

FP4 = QuantSpec(num_bits=4, symmetric=True, role=Role.WEIGHT)


class TestFloat(QuantizerContract):
    quantizer = FloatQuantizer()
    bits = (4, 6, 8)


class TestMX(QuantizerContract):
    quantizer = FloatQuantizer(block_scale="e8m0")
    bits = (4, 6)


def scale_of(quantizer: FloatQuantizer, largest: list[float], spec: QuantSpec = FP4) -> list[float]:
    """Return the scale of blocks with these largest magnitudes."""
    high = torch.tensor(largest).unsqueeze(1)
    qparams = quantizer.fit(Samples(high), Range(-high, high), spec)
    return [float(scale) for scale in quantizer.scales(qparams).flatten()]


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits", "largest", "dtype"),
    [
        (4, 3, 448.0, ml_dtypes.float8_e4m3fn),
        (5, 2, 57344.0, ml_dtypes.float8_e5m2),
        (2, 1, 6.0, ml_dtypes.float4_e2m1fn),
        (2, 3, 7.5, ml_dtypes.float6_e2m3fn),
        (3, 2, 28.0, ml_dtypes.float6_e3m2fn),
    ],
)
def test_values_and_bit_patterns(
    exponent_bits: int, mantissa_bits: int, largest: float, dtype: type[np.generic]
) -> None:
    """Every value and every byte is that of ml_dtypes, ties, subnormals and signed zeros included."""
    spec = QuantSpec(num_bits=1 + exponent_bits + mantissa_bits)
    quantizer = FloatQuantizer(exponent_bits, mantissa_bits)
    quantizer.check(spec)
    assert quantizer.format(spec).largest == largest
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(50_000, generator=generator) * 2.0 ** torch.randint(
        -18, 16, (50_000,), generator=generator
    )
    ties = torch.arange(-200, 200) / 64
    x = torch.cat([wide, ties, torch.zeros(1), -torch.zeros(1)]).clamp(-largest, largest).unsqueeze(0)
    one = QParams(torch.ones(1, 1), torch.zeros(1, 1))
    codes = quantizer.quantize(x, one, spec)
    expected = x.numpy().astype(dtype)
    assert np.array_equal(codes.numpy().astype(np.uint8), expected.view(np.uint8))
    assert np.array_equal(quantizer.dequantize(codes, one, spec).numpy(), expected.astype(np.float32))


def test_e2m1_levels_and_saturation() -> None:
    """0, .5, 1, 1.5, 2, 3, 4, 6 (OCP MX); 7 becomes 6 and passes no gradient."""
    quantizer, one = FloatQuantizer(), QParams(torch.ones(1, 1), torch.zeros(1, 1))
    x = torch.linspace(0, 7, 1001).unsqueeze(0).requires_grad_()
    value = quantizer.fake_quantize(x, one, FP4)
    assert value.unique().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    value.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x <= 6).float())


def test_mx_scales_are_floored_powers_of_two() -> None:
    """X = 2^(floor(log2 amax) - e_max), e_max 2 for E2M1: 5, 6, 7 -> 1, 8 -> 2; one byte each."""
    quantizer = FloatQuantizer(block_scale="e8m0")
    assert scale_of(quantizer, [5, 6, 7, 7.99, 8, 0.3]) == [1, 1, 1, 1, 2, 2.0**-4]
    high = torch.tensor([[5.0]])
    stored = quantizer.fit(Samples(high), Range(-high, high), FP4).scale
    assert stored.dtype is torch.uint8
    assert stored.item() == 127  # E8M0: exponent + 127


@pytest.mark.parametrize(
    ("exponent_bits", "num_bits", "e_max"), [(3, 6, 4), (2, 6, 2), (4, 8, 8), (5, 8, 15), (0, 8, 0)]
)
def test_mx_emax_of_each_element_type(exponent_bits: int, num_bits: int, e_max: int) -> None:
    """e_max: E3M2 4, E2M3 2, E4M3 8, E5M2 15, INT8 0 (OCP MX v1.0)."""
    spec = QuantSpec(num_bits=num_bits)
    assert scale_of(FloatQuantizer(exponent_bits, block_scale="e8m0"), [1.5], spec) == [2.0**-e_max]


def test_mx_shifts_with_the_data() -> None:
    """Multiplying the data by 2^k moves the scale alone, codes stay."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    quantizer = FloatQuantizer(block_scale="e8m0")
    small, large = (quantizer.fit(Samples(v), None, FP4) for v in (x, 8 * x))
    assert torch.equal(large.scale, small.scale + 3)
    assert torch.equal(quantizer.quantize(x, small, FP4), quantizer.quantize(8 * x, large, FP4))


def test_mxint8_steps_by_one_sixty_fourth_below_two() -> None:
    """Element = int8 / 64, largest 1.984375 (OCP MX)."""
    spec, quantizer = QuantSpec(num_bits=8), FloatQuantizer(exponent_bits=0, block_scale="e8m0")
    assert quantizer.format(spec).largest == 1.984375
    x = torch.arange(-127, 128).div(64).unsqueeze(0)
    qparams = quantizer.fit(Samples(x), None, spec)
    assert torch.equal(quantizer.fake_quantize(x, qparams, spec), x)
    assert torch.equal(quantizer.fake_quantize(x + 0.3 / 64, qparams, spec)[:, :-1], x[:, :-1])


def test_nvfp4_scales() -> None:
    """Tensor scale amax / 2688; the block with the largest value has scale 448; both rounded to E4M3."""
    quantizer = FloatQuantizer(block_scale="e4m3")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    qparams = quantizer.fit(Samples(x), None, FP4)
    tensor_scale = qparams.extra["tensor_scale"]
    assert tensor_scale.shape == (1, 1)
    assert tensor_scale.item() == pytest.approx(x.abs().max().item() / 2688)
    block = qparams.scale.view(torch.float8_e4m3fn).float()
    assert block.max().item() == 448
    expected = (x.abs().amax(1) / 6 / tensor_scale.item()).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(block.flatten().numpy(), expected.astype(np.float32))
    assert qparams.scale.nbytes + tensor_scale.nbytes == 64 + 4  # 4 + 8/16 bits a value, and one float


@pytest.mark.parametrize("block_scale", ["e8m0", "e4m3"])
def test_stored_scales_work_a_chunk_at_a_time(block_scale: Literal["e8m0", "e4m3"]) -> None:
    quantizer = FloatQuantizer(block_scale=block_scale)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    qparams = quantizer.fit(Samples(x), None, FP4)
    part = quantizer.rows(qparams, slice(3, 5))
    whole = quantizer.fake_quantize(x, qparams, FP4)
    assert torch.equal(quantizer.fake_quantize(x[3:5], part, FP4), whole[3:5])


def test_fp8_of_a_gaussian_has_three_bits_of_relative_error() -> None:
    """Relative error at most 2^-4 for normal numbers, and its uniform-in-octave mean square."""
    quantizer, spec = FloatQuantizer(), QuantSpec(num_bits=8)
    x = torch.linspace(1, 448, 100_001).unsqueeze(0)
    value = quantizer.fake_quantize(x, QParams(torch.ones(1, 1), torch.zeros(1, 1)), spec)
    assert ((value - x).abs() / x).max().item() == pytest.approx(1 / 17, abs=1e-4)  # half a step above 1


def test_stochastic_rounding_is_unbiased() -> None:
    quantizer: Quantizer[Any] = FloatQuantizer(rounding="stochastic")
    torch.manual_seed(0)
    x = torch.full((1, 200_000), 4.5)
    value = quantizer.fake_quantize(x, QParams(torch.ones(1, 1), torch.zeros(1, 1)), FP4)
    assert sorted(value.unique().tolist()) == [4, 6]
    assert value.mean().item() == pytest.approx(4.5, abs=5e-3)


@pytest.mark.parametrize(
    ("quantizer", "num_bits", "says"),
    [
        (FloatQuantizer(4, 3), 4, "num_bits=8"),
        (FloatQuantizer(), 2, "3 to 16"),
        (FloatQuantizer(4), 4, "no format of 4 bits"),
    ],
)
def test_bits_that_do_not_add_up_are_refused(quantizer: FloatQuantizer, num_bits: int, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quantizer.check(QuantSpec(num_bits=num_bits))


def test_the_largest_number_lies_at_the_end_of_the_range() -> None:
    """A float32 scale is amax / 6 for E2M1 and amax / 448 for E4M3: the largest value is kept exactly."""
    assert scale_of(FloatQuantizer(), [3.0, 12.0]) == [0.5, 2.0]
    assert scale_of(FloatQuantizer(), [896.0], QuantSpec(num_bits=8)) == [2.0]

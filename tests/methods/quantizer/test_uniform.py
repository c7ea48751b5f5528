from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Range, RecipeError, Samples
from qpipe.testing import SIGNED, UNSIGNED, QuantizerContract, fit, gaussian_blocks, sample_blocks


class TestSymmetric(QuantizerContract):
    quantizer = UniformQuantizer()
    bits = (2, 3, 4, 8, 12, 16)

    def test_restricted_levels_are_odd(self) -> None:
        """METHODS.md A: Q(-x) = -Q(x)."""
        spec, x = QuantSpec(4, restricted=True), sample_blocks()
        qparams = fit(self.quantizer, x, spec)
        forward = self.quantizer.fake_quantize(x, qparams, spec)
        assert torch.equal(self.quantizer.fake_quantize(-x, qparams, spec), -forward)

    @pytest.mark.parametrize("num_bits", [1, 17])
    def test_has_two_to_sixteen_bits(self, num_bits: int) -> None:
        with pytest.raises(RecipeError, match=f"has 2 to 16 bits, not {num_bits}"):
            self.quantizer.check(QuantSpec(num_bits))

    def test_unsigned_codes_are_not_restricted(self) -> None:
        with pytest.raises(RecipeError, match="restricted leaves out the least code"):
            self.quantizer.check(QuantSpec(8, signed=False, restricted=True))

    def test_is_affine(self) -> None:
        assert self.quantizer.is_affine(SIGNED)


class TestAsymmetric(QuantizerContract):
    quantizer = UniformQuantizer()
    spec = UNSIGNED
    bits = (2, 4, 8)

    def test_error_is_at_most_half_a_step_in_the_range(self) -> None:
        x = sample_blocks()
        qparams = fit(self.quantizer, x, UNSIGNED)
        error = (self.quantizer.fake_quantize(x, qparams, UNSIGNED) - x).abs()
        assert (error <= qparams.scale * 0.5001 + 1e-7).all()

    def test_uniform_input_has_the_textbook_noise(self) -> None:
        """METHODS.md A: s^2 / 12."""
        x = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
        qparams = fit(self.quantizer, x, UNSIGNED)
        noise = (self.quantizer.fake_quantize(x, qparams, UNSIGNED) - x).square().mean()
        assert noise.item() == pytest.approx(qparams.scale.item() ** 2 / 12, rel=0.02)

    def test_a_bit_is_worth_six_decibels(self) -> None:
        x = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
        stats = Samples(x)
        errors = [
            stats.squared_error(stats.extremes(), self.quantizer, QuantSpec(bits, False, False)).item()
            for bits in (6, 7, 8)
        ]
        assert errors[0] / errors[1] == pytest.approx((127 / 63) ** 2, rel=0.03)
        assert errors[1] / errors[2] == pytest.approx((255 / 127) ** 2, rel=0.03)


def test_eight_bits_on_a_gaussian_have_the_known_sqnr() -> None:
    """METHODS.md E: 40.571 dB at the optimal full-range step."""
    x = gaussian_blocks()
    spec = QuantSpec(8)
    quantizer = UniformQuantizer()
    qparams = fit(quantizer, x.clamp(-0.03077 * 127.5, 0.03077 * 127.5), spec)
    noise = (quantizer.fake_quantize(x, qparams, spec) - x).square().sum()
    assert (10 * torch.log10(x.square().sum() / noise)).item() == pytest.approx(
        40.571, abs=0.06
    )  # quantiles lack the tail


def test_stochastic_rounding_is_unbiased_and_settles_for_evaluation() -> None:
    """Mean x, variance s² f (1 - f) = 0.1875 at f = 0.25 (Gupta et al.; METHODS C)."""
    spec = QuantSpec(num_bits=4, symmetric=True)
    one = QParams(torch.ones(1, 1), torch.zeros(1, 1))
    quantizer = UniformQuantizer(rounding="stochastic")
    x = torch.full((1, 200_000), 2.25)
    torch.manual_seed(0)
    value = quantizer.fake_quantize(x, one, spec)
    assert value.mean().item() == pytest.approx(2.25, abs=4e-3)
    assert value.var().item() == pytest.approx(0.1875, abs=2e-3)
    torch.manual_seed(0)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x, one, spec), one, spec), value)
    assert quantizer.settled().fake_quantize(x, one, spec).unique().tolist() == [2]
    top = torch.full((1, 100_000), 7.0)
    assert quantizer.fake_quantize(top, one, spec).unique().tolist() == [7]


def test_stochastic_rounding_has_the_gradients_of_lsq() -> None:
    """d/dx is 1 inside, 0 beyond; d/ds is code - x/s inside and the bound outside."""
    spec = QuantSpec(num_bits=4, symmetric=True)
    x = torch.tensor([[2.25, -9.0]], requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    value = UniformQuantizer(rounding="stochastic").fake_quantize(x, QParams(scale, torch.zeros(1, 1)), spec)
    value.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [[1, 0]]
    assert scale.grad.item() == pytest.approx(value[0, 0].item() - 2.25 - 8)


def test_levels_cover_the_range_that_is_decided_not_the_one_seen() -> None:
    stats = Samples(torch.tensor([[-9.0, 9.0]]))
    qparams = UniformQuantizer().fit(stats, Range(-torch.ones(1, 1), torch.full((1, 1), 3.0)), UNSIGNED)
    assert qparams.scale.item() == pytest.approx(4 / 255)
    assert qparams.zero_point.item() == 64

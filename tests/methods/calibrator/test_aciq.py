from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.aciq import ACIQCalibrator, gauss_clip, laplace_clip

from qpipe import Distribution, QuantSpec, RecipeError, Samples
from qpipe.testing import (
    UNSIGNED,
    AffineQuantizer,
    CalibratorContract,
    gaussian_blocks,
    histogram,
    laplace_blocks,
)

LAPLACE = (1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968)
GAUSS = (1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240)


def _high(stats: Distribution, spec: QuantSpec, distribution: str = "auto") -> float:
    return ACIQCalibrator(distribution).range(stats, AffineQuantizer(), spec).high.item()


class TestACIQ(CalibratorContract):
    calibrator = ACIQCalibrator()

    def test_ratios_are_those_of_the_paper(self) -> None:
        """METHODS.md A; the paper prints 2.83, 3.89, 5.03 and 1.71, 2.15, 2.55 for 2, 3, 4 bits."""
        assert [laplace_clip(bits) for bits in range(1, 9)] == pytest.approx(LAPLACE, abs=6e-5)
        assert [gauss_clip(bits) for bits in range(1, 9)] == pytest.approx(GAUSS, abs=6e-5)

    def test_fits_the_distribution_it_is_given(self) -> None:
        spec = QuantSpec(4)
        assert _high(histogram(gaussian_blocks()), spec) == pytest.approx(GAUSS[3], rel=1e-3)
        assert _high(histogram(laplace_blocks()), spec) == pytest.approx(LAPLACE[3], rel=1e-3)
        assert _high(Samples(laplace_blocks()), spec, "gauss") == pytest.approx(2**0.5 * GAUSS[3], rel=2e-3)

    def test_a_one_sided_tensor_has_one_more_bit(self) -> None:
        spec = QuantSpec(4, symmetric=False, signed=False)
        for stats in (histogram(gaussian_blocks().clamp(min=0)), Samples(gaussian_blocks().clamp(min=0))):
            assert _high(stats, spec) == pytest.approx(GAUSS[4], rel=2e-3)
        assert _high(histogram(laplace_blocks().abs()), spec) == pytest.approx(LAPLACE[4], rel=2e-3)

    def test_an_asymmetric_range_is_centred_on_the_mean(self) -> None:
        got = self.calibrator.range(Samples(gaussian_blocks() + 2), AffineQuantizer(), UNSIGNED)
        assert ((got.low + got.high) / 2).item() == pytest.approx(2, abs=1e-3)

    def test_refuses_an_unknown_distribution(self) -> None:
        with pytest.raises(RecipeError, match="must be one of auto, gauss, laplace, not 'cauchy'"):
            ACIQCalibrator("cauchy")

    def test_zero_blocks_have_a_range(self) -> None:
        got = self.calibrator.range(Samples(torch.zeros(2, 8)), AffineQuantizer(), UNSIGNED)
        assert got.high.tolist() == [[0], [0]]

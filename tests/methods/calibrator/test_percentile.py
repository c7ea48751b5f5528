from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.percentile import PercentileCalibrator

from qpipe import QuantSpec, RecipeError, Samples
from qpipe.testing import UNSIGNED, AffineQuantizer, CalibratorContract, gaussian_blocks, gaussian_histogram


class TestPercentile(CalibratorContract):
    calibrator = PercentileCalibrator()

    @pytest.mark.parametrize(("percentile", "sigmas"), [(99.9, 3.2905), (99.99, 3.8906), (50, 0.67449)])
    def test_cuts_a_gaussian_at_its_quantile(self, percentile: float, sigmas: float) -> None:
        """METHODS.md A, two-sided."""
        calibrator = PercentileCalibrator(percentile)
        for stats in (gaussian_histogram(1 << 20), Samples(gaussian_blocks(1 << 20))):
            got = calibrator.range(stats, AffineQuantizer(), QuantSpec())
            assert got.high.item() == pytest.approx(sigmas, rel=2e-3)
            assert got.low.item() == pytest.approx(-sigmas, rel=2e-3)

    def test_a_hundred_is_min_max(self) -> None:
        stats = gaussian_histogram()
        got = PercentileCalibrator(100).range(stats, AffineQuantizer(), UNSIGNED)
        assert torch.equal(got.high, stats.extremes().high)

    def test_refuses_a_percentile_outside_its_interval(self) -> None:
        with pytest.raises(RecipeError, match=r"percentile must lie in \(0, 100\], not 101"):
            PercentileCalibrator(101)

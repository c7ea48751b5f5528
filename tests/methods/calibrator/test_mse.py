from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qpipe_methods.calibrator.mse import MSECalibrator

from qpipe import Distribution, QuantSpec, Samples
from qpipe.testing import (
    SIGNED,
    AffineQuantizer,
    CalibratorContract,
    gaussian_blocks,
    gaussian_histogram,
    histogram,
    sample_blocks,
)


def _error(stats: Distribution, calibrator: MSECalibrator, spec: QuantSpec) -> torch.Tensor:
    quantizer = AffineQuantizer()
    return stats.squared_error(calibrator.range(stats, quantizer, spec), quantizer, spec)


class TestMSE(CalibratorContract):
    calibrator = MSECalibrator()

    @pytest.mark.parametrize(
        ("num_bits", "clip", "mse"),
        [(2, 1.2240, 0.190174), (3, 1.9523, 0.0468600), (4, 2.4739, 0.0128894), (8, 3.9205, 8.83080e-5)],
    )
    def test_clips_a_gaussian_at_the_known_optimum(self, num_bits: int, clip: float, mse: float) -> None:
        """METHODS.md A, symmetric, restricted range."""
        spec = QuantSpec(num_bits, restricted=True)
        stats = gaussian_histogram(1 << 20)
        got = self.calibrator.range(stats, AffineQuantizer(), spec).high
        assert got.item() == pytest.approx(clip, abs=0.02 if num_bits < 8 else 0.06)
        exact = Samples(gaussian_blocks(1 << 20))
        error = exact.squared_error(
            self.calibrator.range(stats, AffineQuantizer(), spec), AffineQuantizer(), spec
        )
        assert error.item() / (1 << 20) == pytest.approx(mse, rel=5e-3)

    @pytest.mark.parametrize(
        ("num_bits", "step", "mse"),
        [(2, 1.04839, 0.149431), (3, 0.60182, 0.0406382), (4, 0.33861, 0.0118640), (8, 0.03077, 8.77069e-5)],
    )
    def test_finds_the_best_full_range_step(self, num_bits: int, step: float, mse: float) -> None:
        """METHODS.md A, symmetric, full range."""
        spec = QuantSpec(num_bits)
        stats = gaussian_histogram(1 << 20)
        best = self.calibrator.range(stats, AffineQuantizer(), spec)
        assert AffineQuantizer().fit(stats, best, spec).scale.item() == pytest.approx(step, rel=0.015)
        assert _error(stats, self.calibrator, spec).item() / (1 << 20) == pytest.approx(mse, rel=5e-3)

    @pytest.mark.parametrize("num_bits", [2, 4, 8])
    def test_is_never_worse_than_min_max(self, num_bits: int) -> None:
        quantizer = AffineQuantizer()
        for spec in (QuantSpec(num_bits), QuantSpec(num_bits, symmetric=False, signed=False)):
            for stats in (histogram(sample_blocks()), Samples(sample_blocks())):
                unclipped = stats.squared_error(stats.extremes(), quantizer, spec)
                assert (_error(stats, self.calibrator, spec) <= unclipped).all()

    def test_the_search_is_the_brute_force_minimum(self) -> None:
        x = sample_blocks()[3:4]
        spec = replace(SIGNED, num_bits=4)
        tried = torch.linspace(0.001, 1, 5000)
        brute = min(_brute_error(x, ratio, spec) for ratio in tried.tolist())
        assert _error(Samples(x), self.calibrator, spec).item() <= brute * 1.002

    def test_refines_the_ends_of_an_asymmetric_range(self) -> None:
        """One outlier on one side must not cost the other side its range."""
        x = torch.cat([gaussian_blocks(1 << 14), torch.full((1, 1), -12.0)], 1)
        got = self.calibrator.range(
            Samples(x), AffineQuantizer(), QuantSpec(4, symmetric=False, signed=False)
        )
        assert -3.2 < got.low.item() < -2
        assert 2 < got.high.item() < 3.2


def _brute_error(x: torch.Tensor, ratio: float, spec: QuantSpec) -> float:
    scale = 2 * x.abs().max() * ratio / 15
    return float(((x / scale).round().clamp(spec.quant_min, spec.quant_max) * scale - x).square().sum())

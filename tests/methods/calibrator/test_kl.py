from __future__ import annotations

import math

import pytest
import torch
from qpipe_methods.calibrator.kl import KLCalibrator, divergence

from qpipe import QuantSpec, RecipeError
from qpipe.testing import (
    AffineQuantizer,
    CalibratorContract,
    gaussian_blocks,
    histogram,
    laplace_blocks,
)


def reference_divergence(counts: list[float], clip: int, num_levels: int) -> float:
    """KL(P || Q) as METHODS.md defines it, a bin at a time."""
    p = counts[:clip]
    tail = sum(counts[clip:])
    q = [0.0] * clip
    for level in range(num_levels):
        run = range(level * clip // num_levels, (level + 1) * clip // num_levels)
        occupied = [i for i in run if p[i] > 0]
        for i in occupied:
            q[i] = sum(p[j] for j in run) / len(occupied)
    if p[-1] == 0 and tail > 0:
        q[-1] = 1
    p = [*p[:-1], p[-1] + tail]
    p_sum, q_sum = sum(p), sum(q)
    return sum(a / p_sum * math.log(a / p_sum / (b / q_sum)) for a, b in zip(p, q, strict=True) if a > 0)


def sample_counts(num_bins: int) -> torch.Tensor:
    """Histograms of different shapes: smooth, sparse with empty bins, cut off, with a spike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 20000, generator=generator).abs()
    x[1] = x[1].pow(3)
    x[2].clamp_(max=1.5)
    counts = torch.stack([torch.histc(row, num_bins, 0, float(row.max())) for row in x])
    counts[3, num_bins // 3] += 5000
    return counts


class TestKL(CalibratorContract):
    calibrator = KLCalibrator()

    @pytest.mark.parametrize(("num_bins", "num_levels"), [(64, 8), (150, 16), (256, 32)])
    def test_is_the_plain_loop(self, num_bins: int, num_levels: int) -> None:
        counts = sample_counts(num_bins)
        got = divergence(counts, num_levels)
        for row, block in zip(got, counts.tolist(), strict=True):
            want = [reference_divergence(block, clip, num_levels) for clip in range(num_levels, num_bins + 1)]
            assert row.tolist() == pytest.approx(want, abs=1e-9)
            assert int(row.argmin()) == want.index(min(want))

    def test_is_zero_where_no_bin_is_merged(self) -> None:
        """METHODS.md A: all mass in the first 128 bins, 8 bits."""
        counts = torch.zeros(1, 2048)
        counts[0, :128] = torch.arange(1, 129)
        assert divergence(counts, 128)[0, 0].item() == pytest.approx(0, abs=1e-12)

    def test_clips_outliers_away(self) -> None:
        x = laplace_blocks()
        x[0, 0] = 200
        got = self.calibrator.range(histogram(x), AffineQuantizer(), QuantSpec())
        assert 5 < got.high.item() < 30

    def test_zeros_do_not_move_the_clip(self) -> None:
        """Zero is exact at any clip: half of a ReLU's outputs are zero, and its positive half decides."""
        x = laplace_blocks().abs()
        with_zeros = torch.cat([x, torch.zeros(1, 3 * x.shape[1])], 1)
        spec = QuantSpec(4, symmetric=False, signed=False)
        ranges = [
            self.calibrator.range(histogram(values), AffineQuantizer(), spec) for values in (x, with_zeros)
        ]
        assert torch.equal(ranges[0].high, ranges[1].high)

    def test_few_bits_clip_more(self) -> None:
        stats = histogram(gaussian_blocks())
        clips = [
            self.calibrator.range(stats, AffineQuantizer(), QuantSpec(num_bits)).high.item()
            for num_bits in (3, 4, 6)
        ]
        assert clips == sorted(clips)
        assert 2 < clips[0] < clips[2]

    def test_a_relu_has_all_codes_for_one_side(self) -> None:
        """The same |x| with twice the levels: as many as one more bit gives a two-sided tensor."""
        x = gaussian_blocks()
        one_sided = self.calibrator.range(histogram(x.abs()), AffineQuantizer(), QuantSpec(4, False, False))
        two_sided = self.calibrator.range(histogram(x), AffineQuantizer(), QuantSpec(5))
        assert one_sided.high.item() == pytest.approx(two_sided.high.item(), rel=0.01)
        assert one_sided.low.item() >= 0

    def test_more_levels_than_bins_clip_nothing(self) -> None:
        stats = histogram(gaussian_blocks(1 << 12))
        got = self.calibrator.range(stats, AffineQuantizer(), QuantSpec(16))
        assert torch.equal(got.high, stats.extremes().high)

    def test_refuses_bins_that_are_no_power_of_two(self) -> None:
        with pytest.raises(RecipeError, match="num_bins must be a power of two from 8, not 1000"):
            KLCalibrator(num_bins=1000)

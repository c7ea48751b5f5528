from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.moving_average import MovingAverageCalibrator

from qpipe import BatchExtremes, RecipeError
from qpipe.testing import UNSIGNED, AffineQuantizer, CalibratorContract


class TestMovingAverage(CalibratorContract):
    calibrator = MovingAverageCalibrator(averaging_constant=0.3)

    def test_is_the_recurrence(self) -> None:
        """METHODS.md A: m <- (1 - c) m + c x, started by the first batch."""
        batches = torch.randn(7, 2, 50, generator=torch.Generator().manual_seed(0))
        stats = BatchExtremes()
        want = batches[0].amax(1)
        for i, batch in enumerate(batches):
            stats.update(batch)
            want = 0.7 * want + 0.3 * batch.amax(1) if i else want
        got = self.calibrator.range(stats, AffineQuantizer(), UNSIGNED).high
        torch.testing.assert_close(got.squeeze(1), want)

    def test_skips_batches_that_did_not_reach_the_edge(self) -> None:
        stats = BatchExtremes(first=1, step=2)  # batches 0 and 2 never came
        for value in (1.0, 2.0):
            stats.update(torch.full((1, 3), value))
        got = self.calibrator.range(stats, AffineQuantizer(), UNSIGNED)
        assert got.high.item() == pytest.approx(0.7 * 1 + 0.3 * 2)
        assert got.low.item() == pytest.approx(0.7 * 1 + 0.3 * 2)

    def test_refuses_a_constant_outside_its_interval(self) -> None:
        with pytest.raises(RecipeError, match=r"averaging_constant must lie in \(0, 1\], not 0"):
            MovingAverageCalibrator(averaging_constant=0)

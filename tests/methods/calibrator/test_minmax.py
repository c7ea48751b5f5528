from __future__ import annotations

import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator

from qpipe.statistics import Samples
from qpipe.testing import UNSIGNED, AffineQuantizer, CalibratorContract, sample_blocks


class TestMinMax(CalibratorContract):
    calibrator = MinMaxCalibrator()

    def test_clips_nothing(self) -> None:
        x = sample_blocks()
        got = self.calibrator.range(Samples(x), AffineQuantizer(), UNSIGNED)
        assert torch.equal(torch.cat([got.low, got.high], 1), torch.stack([x.amin(1), x.amax(1)], 1))

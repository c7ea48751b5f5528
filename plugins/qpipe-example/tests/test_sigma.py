import pytest
import torch
from qpipe_example.calibrator.sigma import SigmaCalibrator

from qpipe.testing import CalibratorContract, gaussian_blocks


class TestSigma(CalibratorContract):
    calibrator = SigmaCalibrator(num_sigmas=2.0)

    def test_keeps_two_deviations_of_a_gaussian(self) -> None:
        got = self.ranged(3 * gaussian_blocks() + torch.tensor(1.0))
        assert got.low.item() == pytest.approx(-5, abs=0.02)
        assert got.high.item() == pytest.approx(7, abs=0.02)

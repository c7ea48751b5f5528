import torch
from qpipe_example.quantizer.power_of_two import PowerOfTwoQuantizer

from qpipe.testing import QuantizerContract, fit, sample_blocks


class TestPowerOfTwo(QuantizerContract):
    quantizer = PowerOfTwoQuantizer()

    def test_scale_is_a_power_of_two_and_the_range_fits(self) -> None:
        x = sample_blocks()
        scale = fit(self.quantizer, x, self.spec).scale
        assert torch.equal(scale.log2(), scale.log2().round())
        assert (x.abs().amax(1, keepdim=True) <= scale * 128).all()

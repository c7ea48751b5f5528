from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.quant_noise import Noise, QuantNoise
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Role, Slot

SLOT = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
START = QParams(torch.full((1, 1), 1.0), torch.zeros(1, 1))
X = torch.full((100, 100), 2.3)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_so_many_weights_are_rounded_while_training(rate: float) -> None:
    torch.manual_seed(0)
    rounded = (Noise(SLOT, START, rate).train()(X) == 2).float().mean().item()
    assert rounded == pytest.approx(
        rate, abs=4 * (rate * (1 - rate) / X.numel()) ** 0.5
    )  # 4 sd of a binomial


def test_evaluation_rounds_every_weight() -> None:
    assert (Noise(SLOT, START, 0.1).eval()(X) == 2).all()


def test_clipped_weights_that_are_left_alone_get_their_gradient() -> None:
    torch.manual_seed(0)
    x = torch.full((1000,), 20.0, requires_grad=True)
    Noise(SLOT, START, 0.3).train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.mean().item() == pytest.approx(0.7, abs=0.06)


def test_rates_are_shares() -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        QuantNoise(rate=2)

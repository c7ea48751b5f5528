from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.ewgs import EWGS, ScaledStep
from qpipe_methods.finetune.lsq import LearnedStep
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Role, Slot

SLOT = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
START = QParams(torch.full((1, 1), 0.5), torch.zeros(1, 1))


def gradients(step: LearnedStep, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([0.5 * 2.3, 0.5 * 2.3, 0.5 * -1.4, 0.5 * 9.0], requires_grad=True)
    (step(x) * upstream).sum().backward()
    assert x.grad is not None
    assert step.scale.grad is not None
    return x.grad, step.scale.grad


def test_gradients_are_equation_4() -> None:
    upstream = torch.tensor([2.0, -2.0, 1.0, 1.0])  # errors in steps: 0.3, 0.3, -0.4; clipped
    x, _ = gradients(ScaledStep(SLOT, START, 0.1), upstream)
    expected = [2 * (1 + 0.1 * 0.3), -2 * (1 - 0.1 * 0.3), 1 * (1 - 0.1 * 0.4), 0]
    assert x.tolist() == pytest.approx(expected, abs=1e-5)


def test_zero_strength_is_lsq_and_the_steps_gradient_always_is() -> None:
    upstream = torch.tensor([2.0, -2.0, 1.0, 1.0])
    plain, step = gradients(LearnedStep(SLOT, START), upstream)
    same, _ = gradients(ScaledStep(SLOT, START, 0.0), upstream)
    _, scaled_step = gradients(ScaledStep(SLOT, START, 0.5), upstream)
    assert torch.equal(plain, same)
    assert torch.equal(step, scaled_step)


def test_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        EWGS(delta=-1)

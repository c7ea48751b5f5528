from __future__ import annotations

import math

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.dsq import DSQ, SoftStep, staircase
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Role, Slot


@pytest.mark.parametrize("alpha", [0.01, 0.4, 0.9])
def test_the_staircase_meets_the_levels(alpha: float) -> None:
    codes = torch.arange(-4.0, 5.0, dtype=torch.float64)
    a = torch.tensor(alpha, dtype=torch.float64)
    assert torch.allclose(staircase(codes, a), codes)  # φ(±Δ/2) = ±1
    assert torch.allclose(staircase(codes + 1 - 1e-9, a), codes + 1)
    assert torch.allclose(staircase(codes + 0.5, a), codes + 0.5)


def test_the_staircase_lies_between_rounding_and_the_identity() -> None:
    ratio = torch.tensor([0.1, 0.4, 0.7, 2.2], dtype=torch.float64)
    hard, soft = torch.tensor([1e-12, 1 - 1e-6], dtype=torch.float64)
    assert torch.allclose(staircase(ratio, hard), ratio.round(), atol=0.01)
    assert torch.allclose(staircase(ratio, soft), ratio, atol=1e-6)


def test_its_value_is_equation_3() -> None:
    alpha, x = 0.4, 0.3
    k = math.log(2 / alpha - 1)  # Δ = 1
    s = 1 / (1 - alpha)
    expected = 0.5 * (s * math.tanh(k * (x - 0.5)) + 1)
    found = staircase(*torch.tensor([[x], [alpha]], dtype=torch.float64))
    assert found.item() == pytest.approx(expected)


def test_levels_are_hard_and_gradients_soft() -> None:
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
    step = SoftStep(slot, QParams(torch.full((1, 1), 0.5), torch.zeros(1, 1)), 0.4)
    x = torch.tensor([0.5 * 1.3, 0.5 * 1.5, 0.5 * 20], requires_grad=True)
    y = step(x)
    y.sum().backward()
    assert y.tolist() == [0.5, 1.0, 3.5]
    k = math.log(2 / 0.4 - 1)
    slopes = [0.5 * k / math.cosh(k * d) ** 2 / math.tanh(k / 2) for d in (-0.2, 0.0)]
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([*slopes, 0], rel=1e-5)


def test_alpha_learns_by_the_slope_of_the_soft_levels() -> None:
    """Against differences of the value of eq. 3 written out, times the gradient scale 1 / sqrt(N Q_P)."""
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
    step = SoftStep(slot, QParams(torch.full((1, 1), 0.5), torch.zeros(1, 1)), 0.4, learn=True)
    x = torch.tensor([0.5 * 1.3, 0.5 * 2.9, 0.5 * -0.6])
    (step(x) * torch.tensor([1.0, 2.0, -1.0])).sum().backward()

    def soft(alpha: float) -> float:
        k, s = math.log(2 / alpha - 1), 1 / (1 - alpha)
        values = [0.5 * (0.5 * s * math.tanh(k * (d - 0.5)) + 0.5) for d in (0.3, 0.9, 0.4)]
        return values[0] + 2 * values[1] - values[2]

    assert step.alpha.grad is not None
    slope = (soft(0.4 + 1e-6) - soft(0.4 - 1e-6)) / 2e-6
    assert step.alpha.grad.item() == pytest.approx(slope / math.sqrt(3 * 7), rel=1e-4)
    assert not SoftStep(slot, step.qparams(), 0.4).alpha.requires_grad


def test_the_step_learns_by_the_slope_of_the_soft_levels() -> None:
    """Against differences of s φ(x / s) written out for x = 0.65 and 0.7, times 1 / sqrt(N Q_P)."""
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
    step = SoftStep(slot, QParams(torch.full((1, 1), 0.5), torch.zeros(1, 1)), 0.4)
    step(torch.tensor([0.65, 0.7])).sum().backward()
    k = math.log(2 / 0.4 - 1)

    def soft(s: float) -> float:
        return sum(s * (1.5 + 0.5 * math.tanh(k * (x / s - 1.5)) / 0.6) for x in (0.65, 0.7))

    assert step.scale.grad is not None
    slope = (soft(0.5 + 1e-6) - soft(0.5 - 1e-6)) / 2e-6
    assert step.scale.grad.item() == pytest.approx(slope / math.sqrt(2 * 7), rel=1e-4)


def test_alpha_stays_between_rounding_and_the_identity() -> None:
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=4, role=Role.WEIGHT))
    step = SoftStep(slot, QParams(torch.ones(1, 1), torch.zeros(1, 1)), 0.4, learn=True)
    for value, wanted in ((-0.5, 1e-3), (1.5, 0.99), (0.3, 0.3)):
        step.alpha.data.fill_(value)
        step.constrain()
        assert step.alpha.item() == pytest.approx(wanted)


def test_alpha_lies_between_zero_and_one() -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        DSQ(alpha=1.0)

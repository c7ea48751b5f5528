from __future__ import annotations

from typing import Any

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.qat import QAT, MovingRange
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import nn

from qpipe import QParams, QuantSpec, Role, Slot
from qpipe.nn import FakeQuant

SPEC = QuantSpec(num_bits=8, symmetric=False, signed=False)


def fake_quant(role: Role) -> FakeQuant:
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), QuantSpec(symmetric=False, role=role))
    quantizer = FakeQuant(slot, "edge")
    quantizer.set_qparams(QParams(torch.full((1, 1), 0.1), torch.zeros(1, 1)))
    return quantizer


def test_fixed_ranges_need_no_learner() -> None:
    assert QAT().learner(fake_quant(Role.ACTIVATION)) is None


def test_the_moving_average_has_its_closed_form() -> None:
    momentum, maxima = 0.1, [1.0, 3.0, 2.0]
    learner = MovingRange(
        Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC),
        QParams(torch.full((1, 1), 4 / 255), torch.zeros(1, 1)),  # 0 to 4
        momentum,
    ).train()
    for maximum in maxima:
        learner(torch.tensor([0.0, maximum]))
    expected = 0.9**3 * 4 + sum(0.1 * 0.9 ** (2 - i) * m for i, m in enumerate(maxima))
    assert learner.qparams().scale.item() == pytest.approx(expected / 255, rel=1e-5)
    before = learner.high.clone()
    learner.eval()(torch.tensor([100.0]))
    assert torch.equal(learner.high, before)


def test_moving_weights_are_ranged_by_themselves() -> None:
    learner: Any = QAT(ranges="moving").learner(fake_quant(Role.WEIGHT))
    x = torch.tensor([-1.0, 0.3, 1.55], requires_grad=True)
    learner.train()(x).sum().backward()
    assert learner.qparams().scale.item() == pytest.approx(2.55 / 255)
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


def test_codebooks_have_no_range_to_move() -> None:
    from qpipe_methods.quantizer.ternary import TernaryQuantizer

    quantizer = fake_quant(Role.WEIGHT)
    spec = QuantSpec(num_bits=2, role=Role.WEIGHT)
    quantizer.slot = Slot(TernaryQuantizer(), MinMaxCalibrator(), PerLayer(), spec)
    assert QAT(ranges="moving").learner(quantizer) is None


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed or moving"):
        QAT(ranges="free")  # type: ignore[arg-type]


def test_the_gradient_of_a_weight_is_the_mask() -> None:
    quantizer = fake_quant(Role.WEIGHT)  # codes -128 to 127 of 0.1
    x = nn.Parameter(torch.tensor([-12.9, -12.7, 0.0, 12.65, 12.8]))
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]

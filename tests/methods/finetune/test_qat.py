from __future__ import annotations

from typing import Any

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.qat import QAT, MovingRange
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.binary import BinaryQuantizer
from qpipe_methods.quantizer.ternary import TernaryQuantizer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import nn

from qpipe import QParams, QuantSpec, Role, Samples, Slot
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


def test_a_moving_range_starts_where_calibration_ended() -> None:
    """Codes -64 to 191 of 0.1 about zero, before any batch and after none that counts."""
    start = QParams(torch.full((1, 1), 0.1), torch.full((1, 1), 64.0))
    learner = MovingRange(Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC), start, 0.0).train()
    learner(torch.tensor([-99.0, 99.0]))
    assert learner.qparams().scale.item() == pytest.approx(0.1)
    assert learner.qparams().zero_point.item() == 64


def test_moving_weights_are_ranged_by_themselves() -> None:
    learner: Any = QAT(ranges="moving").learner(fake_quant(Role.WEIGHT))
    x = torch.tensor([-1.0, 0.3, 1.55], requires_grad=True)
    learner.train()(x).sum().backward()
    assert learner.qparams().scale.item() == pytest.approx(2.55 / 255)
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


def moving(quantizer: BinaryQuantizer | TernaryQuantizer, num_bits: int, role: Role) -> Any:  # noqa: ANN401
    fitted = fake_quant(role)
    slot = Slot(quantizer, MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=num_bits, role=role))
    fitted.slot = slot
    fitted.set_qparams(quantizer.fit(Samples(torch.tensor([[1.0, 3.0]])), None, slot.spec))
    return QAT(ranges="moving", momentum=0.25).learner(fitted)


def test_levels_without_a_range_are_fitted_anew_to_weights() -> None:
    learner = moving(TernaryQuantizer(), 2, Role.WEIGHT).train()
    learner(torch.tensor([4.0, -6.0, 0.1, 0.2]))
    assert learner.qparams().scale.item() == pytest.approx(5)
    assert learner.qparams().extra["threshold"].item() == pytest.approx(0.7 * 10.3 / 4)


def test_levels_of_activations_follow_by_a_moving_average() -> None:
    learner = moving(BinaryQuantizer(center=True), 1, Role.ACTIVATION).train()  # 2 ± 1
    learner(torch.tensor([0.0, 12.0]))  # 6 ± 6
    assert learner.qparams().extra["offset"].item() == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert learner.qparams().scale.item() == pytest.approx(0.75 * 1 + 0.25 * 6)
    learner.eval()(torch.tensor([100.0]))
    assert learner.qparams().scale.item() == pytest.approx(2.25)


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed or moving"):
        QAT(ranges="free")  # type: ignore[arg-type]


def test_the_gradient_of_a_weight_is_the_mask() -> None:
    quantizer = fake_quant(Role.WEIGHT)  # codes -128 to 127 of 0.1
    x = nn.Parameter(torch.tensor([-12.9, -12.7, 0.0, 12.65, 12.8]))
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]

from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.pact import PACT, LearnedClip
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, Slot
from qpipe.nn import FakeQuant

SPEC = QuantSpec(num_bits=2, symmetric=False, signed=False)
SLOT = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC)
START = QParams(torch.full((1, 1), 2.0), torch.zeros(1, 1))


def test_output_is_equation_1_rounded_to_the_levels() -> None:
    clip = LearnedClip(SLOT, START, 1.5, 0.0)
    x = torch.linspace(-2, 3, 41)
    clipped = 0.5 * (x.abs() - (x - 1.5).abs() + 1.5)
    assert torch.allclose(clip(x), torch.round(clipped * 3 / 1.5) * 1.5 / 3)


def test_alpha_learns_from_what_is_clipped_only() -> None:
    clip = LearnedClip(SLOT, START, 1.5, 0.0)
    x = torch.tensor([-1.0, 0.7, 1.4, 1.6, 9.0], requires_grad=True)
    (clip(x) * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])).sum().backward()
    assert clip.alpha.grad is not None
    assert clip.alpha.grad.item() == 11000
    assert x.grad is not None
    assert x.grad.tolist() == [0, 10, 100, 0, 0]


def test_alpha_starts_where_asked_and_is_penalised_by_its_square() -> None:
    assert LearnedClip(SLOT, START, None, 0.0).alpha.item() == 6
    clip = LearnedClip(SLOT, START, 3.0, 0.1)
    assert clip.penalty().item() == pytest.approx(0.9)
    assert clip.qparams().scale.item() == 1


def test_values_below_zero_keep_their_calibrated_range() -> None:
    fake_quant = FakeQuant(SLOT, "edge")
    fake_quant.set_qparams(START)
    assert isinstance(PACT().learner(fake_quant), LearnedClip)
    fake_quant.set_qparams(QParams(torch.ones(1, 1), torch.ones(1, 1)))
    assert PACT().learner(fake_quant) is None

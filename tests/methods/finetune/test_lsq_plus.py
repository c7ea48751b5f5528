from __future__ import annotations

import math

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.lsq_plus import LearnedOffset, LSQPlus, largest_at_three_sigma
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe import QParams, QuantSpec, Slot
from qpipe.nn import weight_quantizers
from qpipe.pipeline import quantize

SPEC = QuantSpec(num_bits=2, symmetric=False, signed=False)  # codes 0 to 3


def learner(scale: float, zero_point: float) -> LearnedOffset:
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC)
    return LearnedOffset(slot, QParams(torch.tensor([[scale]]), torch.tensor([[zero_point]])))


@pytest.mark.parametrize(("x", "slope"), [(0.3, 0.0), (-0.4, 0.0), (5.0, 1.0), (-3.0, 1.0)])
def test_the_offsets_gradient_is_0_inside_and_1_outside(x: float, slope: float) -> None:
    step = learner(0.5, 1.0)  # -0.5 to 1.0
    step(torch.tensor([[x]])).sum().backward()
    assert step.offset.grad is not None
    assert step.offset.grad.item() == pytest.approx(slope / math.sqrt(1 * 3), abs=1e-6)


def test_the_steps_gradient_is_lsqs_shifted_by_the_offset() -> None:
    step = learner(0.5, 1.0)
    step(torch.tensor([[0.35]])).sum().backward()  # (x - offset) / scale = 1.7
    assert step.scale.grad is not None
    assert step.scale.grad.item() == pytest.approx(0.3 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize(("x", "bound"), [(5.0, 3.0), (-3.0, 0.0)])
def test_the_steps_gradient_beyond_the_range_is_the_bound(x: float, bound: float) -> None:
    """Eq. 5: s clip((x - β) / s, n, p) + β has the slope p above and n below, β held."""
    step = learner(0.5, 1.0)
    step(torch.tensor([[x]])).sum().backward()
    assert step.scale.grad is not None
    assert step.scale.grad.item() == pytest.approx(bound / math.sqrt(3), abs=1e-6)


def test_the_zero_point_is_an_integer_at_any_time() -> None:
    step = learner(0.5, 1.0)
    step.offset.data.fill_(-0.8)
    assert step.qparams().zero_point.item() == 2
    assert step(torch.zeros(1, 1)).item() == 0


def test_weights_start_at_three_standard_deviations() -> None:
    blocks = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [0.0, 2.0, 0.0, 2.0]])  # means 0 and 1, sd 1
    assert largest_at_three_sigma(blocks).flatten().tolist() == [3.0, 4.0]


def test_training_starts_weights_there_over_half_the_codes() -> None:
    """max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1) of each row at 3 bits, left alone by no epoch."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    tuned, _ = quantize(
        layer,
        [(torch.randn(16, 6), torch.arange(16) % 3)],
        task=Classification(),
        finetune=[{"name": "lsq_plus", "epochs": 0}],
        evaluator=[],
        weight={"num_bits": 3},
    )
    (weight,) = weight_quantizers(tuned)
    rows = layer.weight.detach()
    mean, spread = rows.mean(1, keepdim=True), 3 * rows.std(1, keepdim=True, correction=0)
    assert torch.allclose(weight.fake_quant.scale, (mean.abs() + spread) / 4)


def test_unknown_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="lsq_plus or calibrated"):
        LSQPlus(init="lsq")  # type: ignore[arg-type]

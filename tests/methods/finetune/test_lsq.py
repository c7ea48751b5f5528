from __future__ import annotations

import math

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.lsq import LSQ, LearnedStep
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import Tensor, nn

from qpipe import Granularity, QParams, QuantSpec, RecipeError, Role, Slot
from qpipe.nn import edge_quantizers, weight_quantizers
from qpipe.pipeline import quantize

SIGNED = QuantSpec(num_bits=4, role=Role.WEIGHT)  # codes -8 to 7


def slot(spec: QuantSpec = SIGNED, granularity: Granularity | None = None) -> Slot:
    return Slot(UniformQuantizer(), MinMaxCalibrator(), granularity or PerLayer(), spec)


def step_gradient(x: Tensor, scale: float, spec: QuantSpec = SIGNED) -> float:
    """Return the gradient of the sum of outputs by the step."""
    learner = LearnedStep(slot(spec), QParams(torch.tensor([[scale]]), torch.zeros(1, 1)))
    learner(x).sum().backward()
    assert learner.scale.grad is not None
    return learner.scale.grad.item()


@pytest.mark.parametrize(
    ("ratio", "slope"),
    [(3.7, 0.3), (3.2, -0.2), (3.0, 0.0), (-0.4, 0.4), (9.0, 7.0), (-20.0, -8.0), (7.4, 7.0)],
)
def test_the_steps_gradient_is_equation_3(ratio: float, slope: float) -> None:
    gradient_scale = 1 / math.sqrt(1 * 7)  # one weight, Q_P = 7
    assert step_gradient(torch.tensor([ratio * 0.5]), 0.5) == pytest.approx(slope * gradient_scale, abs=1e-6)


def test_the_gradient_scale_is_one_over_the_root_of_n_times_q() -> None:
    x = torch.full((100,), 3.7)  # METHODS.md C: N = 100, Q_P = 7 gives 0.037796
    assert step_gradient(x, 1.0) / (100 * 0.3) == pytest.approx(0.037796, rel=1e-4)
    unsigned = QuantSpec(num_bits=2, symmetric=False, signed=False, role=Role.ACTIVATION)
    batch = torch.full((5, 12), 0.7)  # N is the 12 features of a sample, Q_P = 3
    assert step_gradient(batch, 1.0, unsigned) / (60 * 0.3) == pytest.approx(1 / 6, rel=1e-4)


def test_weights_pass_straight_through_inside_the_range_only() -> None:
    x = torch.tensor([-8.1, -7.9, 0.2, 6.9, 7.1], requires_grad=True)
    LearnedStep(slot(), QParams(torch.ones(1, 1), torch.zeros(1, 1)))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_each_channel_learns_its_own_step() -> None:
    learner = LearnedStep(slot(granularity=PerChannel()), QParams(torch.ones(2, 1), torch.zeros(2, 1)))
    learner(torch.tensor([[3.7, 3.7], [3.0, 3.0]])).sum().backward()
    assert learner.scale.grad is not None
    expected = [2 * 0.3 / math.sqrt(2 * 7), 0]
    assert learner.scale.grad.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_steps_start_at_twice_the_mean_magnitude() -> None:
    learner = LearnedStep(slot(), QParams(torch.ones(2, 1), torch.zeros(2, 1)))
    learner.start(torch.tensor([[0.5], [0.0]]))
    assert learner.scale.flatten().tolist() == pytest.approx([1 / math.sqrt(7), 1.0])  # dead: as calibrated


def test_steps_stay_positive() -> None:
    learner = LearnedStep(slot(), QParams(-torch.ones(1, 1), torch.zeros(1, 1)))
    learner.constrain()
    assert learner.scale.item() > 0


def quantized(strategy: LSQ | None, bits: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    data = [torch.randn(8, 6)]
    prepared, _ = quantize(model, data, evaluator=[], target="generic", weight={"num_bits": bits})
    if strategy:
        from qpipe import Task
        from qpipe.stages.data import as_datamodule

        with strategy._learning(prepared):
            strategy.begin(prepared, as_datamodule(data), Task())
    return prepared


def test_begin_starts_weights_and_activations_from_their_magnitudes() -> None:
    tuned = quantized(LSQ())
    for weight in weight_quantizers(tuned):
        expected = 2 * weight.blocks_input().abs().mean(1, keepdim=True) / math.sqrt(7)
        assert torch.allclose(weight.fake_quant.scale, expected)
    torch.manual_seed(0)
    nn.Linear(6, 5), nn.Linear(5, 2)
    x = torch.randn(8, 6)
    edge = edge_quantizers(tuned)[0]
    above_zero = 255 - edge.zero_point
    assert torch.allclose(edge.scale, 2 * x.abs().mean() / above_zero.sqrt())


def test_a_calibrated_start_is_kept() -> None:
    plain, tuned = quantized(None), quantized(LSQ(init="calibrated"))
    for a, b in zip(weight_quantizers(plain), weight_quantizers(tuned), strict=True):
        assert torch.equal(a.fake_quant.scale, b.fake_quant.scale)


def test_levels_without_a_step_are_refused() -> None:
    with pytest.raises(RecipeError, match="finetune=qat"):
        quantize(
            nn.Linear(6, 5),
            [torch.randn(8, 6)],
            finetune=[{"name": "lsq", "distill": {"weight": 1.0}}],
            quantizer="log",
            evaluator=[],
            trainer=Trainer(accelerator="cpu", logger=False, enable_checkpointing=False),
        )

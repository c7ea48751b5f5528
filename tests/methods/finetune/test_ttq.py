from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.ttq import TTQ, LearnedPair
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.ternary import TernaryQuantizer
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe import QParams, QuantSpec, RecipeError, Role, Slot
from qpipe.pipeline import quantize

SPEC = QuantSpec(num_bits=2, role=Role.WEIGHT)
SLOT = Slot(TernaryQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC)
X = [4.0, 3.0, 0.15, -0.15, -0.3, -2.0, 0.3, 0.0]  # the threshold is 0.05 * 4 = 0.2


def pair(positive: float, negative: float, share: float = 0.05) -> LearnedPair:
    learner = LearnedPair(SLOT, QParams(torch.ones(1, 1), torch.zeros(1, 1)), share)
    learner.positive.data.fill_(positive)
    learner.negative.data.fill_(negative)
    return learner.train()


def test_weights_up_to_a_twentieth_of_the_largest_are_zero() -> None:
    y = pair(1.5, 0.7)(torch.tensor(X))
    assert y.tolist() == pytest.approx([1.5, 1.5, 0, 0, -0.7, -0.7, 1.5, 0])


def test_gradients_are_equations_7_and_8() -> None:
    x = torch.tensor(X, requires_grad=True)
    learner = pair(1.5, 0.7)
    upstream = torch.tensor([1.0, -2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0])
    (learner(x) * upstream).sum().backward()
    assert learner.positive.grad is not None
    assert learner.negative.grad is not None
    assert x.grad is not None
    assert learner.positive.grad.item() == pytest.approx(1 - 2 + 13)
    assert learner.negative.grad.item() == pytest.approx(-(7 + 11))
    expected = [1.5 * 1, 1.5 * -2, 3, 5, 0.7 * 7, 0.7 * 11, 1.5 * 13, 17]
    assert x.grad.tolist() == pytest.approx(expected)


def test_the_magnitudes_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(200), torch.randn(200)
    learner = pair(1.1, 0.6)
    (learner(x) * upstream).sum().backward()
    for name in ("positive", "negative"):
        grad = learner.get_parameter(name).grad
        assert grad is not None
        losses = []
        for step in (0.25, -0.25):  # the loss is linear in each magnitude
            moved = pair(1.1, 0.6)
            moved.get_parameter(name).data.add_(step)
            losses.append((moved(x) * upstream).sum().item())
        assert grad.item() == pytest.approx((losses[0] - losses[1]) / 0.5, rel=1e-4)


def test_magnitudes_start_at_the_means_of_their_sides() -> None:
    learner = pair(9.0, 9.0)
    learner.start(torch.tensor(X))
    assert learner.positive.item() == pytest.approx((4 + 3 + 0.3) / 3)
    assert learner.negative.item() == pytest.approx((0.3 + 2) / 2)
    learner.start(torch.tensor([1.0, 3.0]))
    assert learner.positive.item() == pytest.approx(2)
    assert learner.negative.item() == pytest.approx(1.15)  # no negative weight


def test_what_is_learned_outlives_training() -> None:
    """Evaluation rounds by the ternary quantizer, with the two magnitudes it was left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tuned, _ = quantize(
        model,
        data,
        task=Classification(),
        trainer=trainer,
        finetune=[{"name": "ttq", "lr": 0.01}],
        evaluator=[],
        weight={"num_bits": 2, "quantizer": "ternary", "granularity": "layer"},
    )
    layer: Any = tuned.get_submodule("0")
    levels = layer.weight.unique()
    assert len(levels) == 3
    assert levels[0] < 0 == levels[1] < levels[2]
    assert -levels[0] != levels[2]


def test_other_codes_are_refused() -> None:
    with pytest.raises(RecipeError, match="quantizer=ternary"):
        TTQ().begin(nn.Linear(2, 2), data=None, task=None)  # type: ignore[arg-type]


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        TTQ(threshold=1.5)

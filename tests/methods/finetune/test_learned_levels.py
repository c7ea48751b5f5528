from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.learned_levels import Levels
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.codebook import CodebookQuantizer
from qpipe_zoo.task.classification import Classification

from qpipe import QParams, QuantSpec, RecipeError, Role, Slot
from qpipe.pipeline import quantize
from qpipe.statistics import Samples

SPEC = QuantSpec(num_bits=2, role=Role.WEIGHT)


def learner(x: torch.Tensor) -> Levels:
    quantizer = CodebookQuantizer()
    start: QParams = quantizer.fit(Samples(x), None, SPEC)
    return Levels(Slot(quantizer, MinMaxCalibrator(), PerLayer(), SPEC), start, 0.5)


def test_a_levels_gradient_is_the_sum_over_the_values_assigned_to_it() -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(1, 50, requires_grad=True), torch.randn(1, 50)
    levels = learner(x.detach())
    (levels(x) * upstream).sum().backward()
    (table,) = levels.extra.values()
    table_, scale = table.detach().double() * 1.0, levels.scale.double()
    nearest = (x.detach().double().T - table_ * scale).abs().argmin(-1)
    one_hot = torch.nn.functional.one_hot(nearest, 4).float()
    assert table.grad is not None
    assert torch.allclose(table.grad, upstream @ one_hot * levels.scale, atol=1e-5)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)  # straight through


def test_levels_that_follow_from_a_scale_are_refused() -> None:
    with pytest.raises(RecipeError, match="use quantizer=codebook, or finetune=lsq for scales"):
        quantize(
            torch.nn.Linear(4, 3),
            [(torch.randn(4, 4), torch.arange(4) % 3)],
            task=Classification(),
            finetune=["learned_levels"],
            evaluator=[],
        )


def test_the_rounding_error_is_in_the_loss_once() -> None:
    x = torch.tensor([[-3.0, -1.0, 1.0, 3.5, 4.5]])
    levels = learner(x)
    error = (levels(x) - x).square().mean() / x.square().mean()
    assert error > 0
    penalty = levels.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * error.item(), rel=1e-5)
    assert levels.penalty() is None

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.quant_noise import Noise, QuantNoise
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from qpipe_methods.quantizer.vector import VectorQuantizer
from qpipe_zoo.task.classification import Classification

from qpipe import QParams, QuantSpec, Role, Slot
from qpipe.nn import weight_quantizers
from qpipe.pipeline import quantize

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


def test_values_of_one_code_are_rounded_together() -> None:
    torch.manual_seed(0)
    slot = Slot(
        VectorQuantizer(dim=4), MinMaxCalibrator(), PerLayer(), QuantSpec(num_bits=1, role=Role.WEIGHT)
    )
    codebook = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [9.0] * 4]])
    start = QParams(torch.ones(1, 1), torch.zeros(1, 1), {"codebook": codebook})
    rounded = Noise(slot, start, 0.3).train()(torch.full((400, 4), 2.3)) != 2.3
    assert (rounded.all(1) | ~rounded.any(1)).all()
    assert rounded.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 400) ** 0.5)


@pytest.mark.parametrize("refit", [True, False])
def test_ranges_follow_the_weights_after_each_epoch(refit: bool) -> None:
    """Min-max of 4 bits: the step of each row is its largest weight over 7."""
    torch.manual_seed(0)
    words = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tuned, _ = quantize(
        torch.nn.Linear(6, 3),
        [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)],
        task=Classification(),
        trainer=Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **words),
        finetune=[{"name": "quant_noise", "lr": 0.1, "refit": refit}],
        evaluator=[],
        weight={"num_bits": 4},
    )
    (weight,) = weight_quantizers(tuned)
    steps = weight.blocks_input().abs().amax(1, keepdim=True) / 7
    assert torch.allclose(weight.fake_quant.scale, steps) is refit


def test_rates_are_shares() -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        QuantNoise(rate=2)

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.finetune.gradual import Gradual, rescaled
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe import QParams, QuantSpec, Role, Slot
from qpipe.nn import FakeQuant
from qpipe.pipeline import quantize

SPEC = QuantSpec(num_bits=2, restricted=True, role=Role.WEIGHT)  # -1, 0, 1


def fake_quant() -> FakeQuant:
    quantizer = FakeQuant(Slot(UniformQuantizer(), MinMaxCalibrator(), PerLayer(), SPEC), "weight")
    quantizer.set_qparams(QParams(torch.full((1, 1), 0.7), torch.zeros(1, 1)))
    return quantizer


@pytest.mark.parametrize(("width", "num_levels"), [(8, 255), (4, 15), (3, 7), (2, 3)])
def test_a_round_has_the_levels_of_its_width_over_the_same_range(width: int, num_levels: int) -> None:
    strategy = Gradual()
    strategy.width = width
    learner: Any = strategy.learner(fake_quant())
    x = torch.linspace(-0.7, 0.7, 100_001)
    levels = learner(x).detach().unique()
    assert len(levels) == num_levels
    assert levels[-1].item() == pytest.approx(0.7, rel=1e-5)
    assert learner.qparams().scale.item() == pytest.approx(0.7, rel=1e-5)  # of the 2 bits that are kept


def test_asymmetric_ranges_keep_their_ends() -> None:
    narrow = QuantSpec(num_bits=2, symmetric=False, signed=False)
    wide = QuantSpec(num_bits=4, symmetric=False, signed=False)
    start = QParams(torch.full((1, 1), 0.5), torch.ones(1, 1))  # -0.5 to 1.0
    moved = rescaled(start, narrow, wide)
    assert moved.scale.item() == pytest.approx(1.5 / 15)
    assert moved.zero_point.item() == 5
    assert rescaled(moved, wide, narrow).scale.item() == pytest.approx(0.5)


def test_widths_fall_to_the_bits_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    begin = Gradual.begin
    monkeypatch.setattr(
        Gradual, "begin", lambda self, *args: (rounds.append(self.width), begin(self, *args))[1]
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    slots = {"weight": {"num_bits": 3, "granularity": "layer"}, "activation": {"num_bits": 5}}
    tuned, _ = quantize(
        model, data, task=Classification(), trainer=trainer, finetune=["gradual"], evaluator=[], **slots
    )
    assert rounds == [8, 6, 4, 3]
    layer: Any = tuned.get_submodule("0")
    assert len(layer.weight.unique()) <= 7


def test_rising_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="fall from round to round"):
        Gradual(bits=(4, 6))

from __future__ import annotations

from qpipe_methods.finetune.distill import Distill
from qpipe_methods.finetune.none import NoFinetuning
from torch import nn

from qpipe.distillation import Distillation


def test_soft_targets_weigh_nine_tenths_unless_given() -> None:
    assert Distill().distillation == Distillation(weight=0.9)
    assert Distill(distill={"weight": 0.5, "temperature": 2.0}).distillation == Distillation(0.5, 2.0)


def test_none_trains_nothing() -> None:
    model = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    NoFinetuning().fit(model, None, None, None, None, None)  # type: ignore[arg-type]
    assert all((before[name] == value).all() for name, value in model.state_dict().items())

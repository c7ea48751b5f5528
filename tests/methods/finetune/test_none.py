from __future__ import annotations

from qpipe_methods.finetune.none import NoFinetuning
from torch import nn


def test_none_trains_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    NoFinetuning().fit(model, None, None, None, None, None)  # type: ignore[arg-type]
    assert all((before[name] == value).all() for name, value in model.state_dict().items())

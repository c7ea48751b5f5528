from __future__ import annotations

from qpipe_methods.finetune.distill import Distill

from qpipe.distillation import Distillation


def test_soft_targets_weigh_nine_tenths_unless_given() -> None:
    assert Distill().distillation == Distillation(weight=0.9)
    assert Distill(distill={"weight": 0.5, "temperature": 2.0}).distillation == Distillation(0.5, 2.0)

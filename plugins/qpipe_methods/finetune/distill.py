"""Train on what the float model says."""

from __future__ import annotations

from typing import Any, Unpack

from qpipe import FinetuneStrategy, TrainingStrategy, hookimpl
from qpipe.training import Training


class Distill(TrainingStrategy):
    """Train the weights on the float model's soft targets; ranges stay fixed.

    Any other training strategy distils too, by its own `distill`.

    Args:
        distill: see Distillation; its weight is 0.9 unless given.
        training: see TrainingStrategy.

    Source: Hinton et al., 2015, arXiv 1503.02531; with quantization: Polino et al., 2018, arXiv 1802.05668.
    Equation: L = (1 - a) task + a T² KL(softmax(t/T) ‖ softmax(s/T))
    """

    name = "distill"

    def __init__(self, **training: Unpack[Training]) -> None:
        given: dict[str, Any] = dict(training.get("distill") or {})
        training["distill"] = {"weight": 0.9, **given}
        super().__init__(**training)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer distillation."""
    return [Distill]

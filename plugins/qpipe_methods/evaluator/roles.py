"""Which of the two, weights or activations, costs what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from qpipe import Evaluator, Role, Subject, hookimpl
from qpipe.nn import FakeQuant

_CASES = (("weights only", Role.ACTIVATION), ("activations only", Role.WEIGHT), ("both", None))


class RolesEvaluator(Evaluator):
    """Measure the simulation with weights alone quantized, with activations alone, and with both.

    Every metric of the run's evaluators is taken, over the same batches for all three.

    Args:
        num_batches: evaluation batches that are read, each four times.
    """

    name = "roles"

    def __init__(self, num_batches: int = 4) -> None:
        self.num_batches = num_batches

    @torch.inference_mode()
    def tables(self, subject: Subject) -> Mapping[str, Any]:
        """Return {'roles': [{'quantized': 'weights only', metric: …}, …]} for the simulation."""
        if subject.variant != "simulated":
            return {}
        fed = {case: _metrics(subject) for case, _ in _CASES}
        for batch in islice(subject.batches, self.num_batches):
            args, kwargs = subject.task.inputs(batch)
            expected = subject.reference.model(*args, **kwargs)
            for case, role in _CASES:
                with _without(subject.model, role):
                    output = subject.model(*args, **kwargs)
                for metric in fed[case].values():
                    metric.to(subject.task.compared(output).device).update(output, expected, batch)
        rows = [
            {"quantized": case, **{name: float(metric.compute()) for name, metric in metrics.items()}}
            for case, metrics in fed.items()
        ]
        return {
            "title": "Where the loss comes from",
            "about": f"The simulation with one of the two left in floating point; {self.num_batches} batches "
            "at most.",
            **_finding(rows),
            "roles": rows,
        }


def _finding(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say which role loses more, where the output is compared with the float model's."""
    weights, activations, _ = (row.get("sqnr_db") for row in rows)
    if weights is None or activations is None or weights == activations:
        return {}
    (low, worse), (high, other) = sorted([(weights, "weights"), (activations, "activations")])
    return {
        "finding": f"Most of the loss comes from {worse}: quantized alone they leave {low:.1f} dB, "
        f"{other} {high:.1f} dB."
    }


def _metrics(subject: Subject) -> dict[str, Any]:
    return {
        name: metric
        for evaluator in subject.recipe.evaluators
        for name, metric in evaluator.metrics(subject.task, "simulated").items()
    }


@contextmanager
def _without(model: nn.Module, role: Role | None) -> Iterator[None]:
    """Leave one role in floating point."""
    off = [m for m in model.modules() if isinstance(m, FakeQuant) and m.enabled and m.slot.spec.role is role]
    try:
        for quantizer in off:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in off:
            quantizer.enabled = True


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the loss by role."""
    return [RolesEvaluator]

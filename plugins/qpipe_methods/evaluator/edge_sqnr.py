"""Which edge quantization hurts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Evaluator, Subject, hookimpl
from qpipe.nn import FakeQuant, disabled, edge_quantizers


class EdgeSQNREvaluator(Evaluator):
    """List the edges of the simulation by their signal-to-quantization-noise ratio, worst first.

    The error at an edge is all that was lost up to there. One batch is held at a time.

    Args:
        num_batches: evaluation batches that are read, each twice.
    """

    name = "edge_sqnr"

    def __init__(self, num_batches: int = 4) -> None:
        self.num_batches = num_batches

    def tables(self, subject: Subject) -> Mapping[str, Any]:
        """Return {'edges': [{'edge': name, 'sqnr_db': …}, …]} for the simulation."""
        if subject.variant != "simulated":
            return {}
        sums = {edge: torch.zeros(2, dtype=torch.float64) for edge in edge_quantizers(subject.model)}
        with torch.inference_mode():
            for batch in islice(subject.batches, self.num_batches):
                _compare(subject, batch, sums)
        rows = [{"edge": edge.name, "sqnr_db": sqnr_db(*both.tolist())} for edge, both in sums.items()]
        return {
            "title": "Edges, worst first",
            "about": "Signal over noise at each quantized activation, with all that was lost up to there.",
            "edges": sorted(rows, key=lambda row: float(row["sqnr_db"])),
        }


def sqnr_db(signal: float, noise: float) -> float:
    """Return the ratio of two energies in decibels; infinite where there is no noise."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def _compare(subject: Subject, batch: Any, sums: Mapping[FakeQuant, Tensor]) -> None:  # noqa: ANN401
    args, kwargs = subject.task.inputs(batch)
    floats: dict[FakeQuant, Tensor] = {}

    def keep(edge: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        floats[edge] = output  # type: ignore[index]  # only edges are hooked

    def add(edge: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        reference = floats.pop(edge)  # type: ignore[call-overload]
        energies = (reference.double().square().sum(), (output - reference).double().square().sum())
        sums[edge] += torch.stack(energies).cpu()  # type: ignore[index]

    with disabled(subject.model), _hooked(sums, keep):
        subject.model(*args, **kwargs)
    with _hooked(floats.copy(), add):
        subject.model(*args, **kwargs)


@contextmanager
def _hooked(edges: Mapping[FakeQuant, Any], hook: Any) -> Iterator[None]:  # noqa: ANN401
    handles = [edge.register_forward_hook(hook) for edge in edges]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the table of edges."""
    return [EdgeSQNREvaluator]

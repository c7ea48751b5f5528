"""Scale up the channels that activations make important, before weights are rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qpipe import Recipe, Role, Samples, Slot, Task, Transform, hookimpl
from qpipe.nn import on_blocks
from qpipe.task import Batches
from qpipe_methods.transform._scaling import (
    Junction,
    check_kept,
    find_junctions,
    held,
    recorded,
    watch_inputs,
)

_LEAST = 1e-4


class AWQ(Transform):
    """Search, for each junction, the power of the mean activation that makes the rounded layers err least.

    The function is kept; a scale of 1, which is rounding to nearest, is among the candidates. For the clip
    search that follows in the paper, chain finetune=[seqmse]: it searches the range of each block.

    Args:
        steps: powers tried, evenly spaced in [0, 1).
        rows: tokens on which they are compared, spread over the calibration batches.

    Source: Lin et al., 2023, arXiv 2306.00978, eqs. 4 and 5; scales normalised by
        sqrt(max * min) as in its code.
    Equation: s = mean|X|^α, α minimizing ||Q(W diag(s)) (diag(s)^-1 X) - W X||
    """

    name = "awq"

    def __init__(self, steps: int = 20, rows: int = 512) -> None:
        self.steps = steps
        self.rows = rows

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Scale every junction whose readers' weights the recipe quantizes."""
        recording = recorded(model, batches, task)
        slots = {j: _slots(j, recipe) for j in find_junctions(model, recording)}
        junctions = [junction for junction, found in slots.items() if any(found)]
        seen = [_Seen(len(junction.index)) for junction in junctions]
        share = max(1, self.rows // max(1, sum(1 for _ in batches)))
        watch_inputs(model, batches, task, junctions, lambda number, x: seen[number].add(x, share))
        for junction, inputs in zip(junctions, seen, strict=True):
            weights = [held(model, path, "weight").float().cpu() for path in junction.readers]
            junction.divide(model, self.scale(junction, inputs, weights, slots[junction]))
        check_kept(model, recording, batches, task, self.name)

    def scale(
        self, junction: Junction, seen: _Seen, weights: Sequence[Tensor], slots: Sequence[Slot | None]
    ) -> Tensor:
        """Return the candidate [rows] under which the rounded weights [O, C] err least on what was seen."""
        mean = junction.largest(seen.total / seen.count).clamp(min=_LEAST)
        x = torch.cat(seen.rows)
        best, least = torch.ones_like(mean), float("inf")
        for step in range(self.steps):
            scale = mean.pow(step / self.steps)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = output_error(x, weights, slots, scale[junction.index])
            if error < least:
                best, least = scale, error
        return best


class _Seen:
    """What reached a junction: the sum of magnitudes, and some rows."""

    def __init__(self, width: int) -> None:
        self.total, self.count = torch.zeros(width), 0
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, share: int) -> None:
        """Take in x [N, C], and keep share of its rows, evenly spaced."""
        self.total += x.abs().sum(0).to(self.total)
        self.count += len(x)
        self.rows.append(x[torch.linspace(0, len(x) - 1, min(share, len(x))).long()].to(self.total))


def output_error(x: Tensor, weights: Sequence[Tensor], slots: Sequence[Slot | None], scale: Tensor) -> float:
    """Return the squared error of layers that round their weights [O, C] times scale [C]; inputs x [N, C]."""
    total = 0.0
    for weight, slot in zip(weights, slots, strict=True):
        if slot is not None:
            change = rounded(weight * scale, slot) / scale - weight
            total += (x @ change.T).square().sum().item()
    return total


def rounded(weight: Tensor, slot: Slot) -> Tensor:
    """Return a weight as the slot rounds it."""
    stats = Samples(slot.granularity.to_blocks(weight))
    ranged = slot.calibrator.range(stats, slot.quantizer, slot.spec) if slot.quantizer.uses_range else None
    return on_blocks(slot, weight, slot.quantizer.fit(stats, ranged, slot.spec))


def _slots(junction: Junction, recipe: Recipe) -> list[Slot | None]:
    return [recipe.slot(path, Role.WEIGHT) for path in junction.readers]


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer AWQ."""
    return [AWQ]

"""Statistics, then ranges, then parameters: weights from themselves, activations from data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from qpipe.errors import DataError, RecipeError
from qpipe.nn import FakeQuant, disabled, edge_quantizers, weight_quantizers
from qpipe.recipe import Slot
from qpipe.stages.data import process
from qpipe.stages.forward import forward_pass
from qpipe.statistics import Extremes, Histogram, Samples, Statistics
from qpipe.types import QParams

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from qpipe.task import Batches, Task


def calibrate(model: nn.Module, batches: Batches, task: Task, trainer: Trainer) -> tuple[str, ...]:
    """Fit the parameters of every static quantizer in model; return what the user should know.

    Raises:
        DataError: weights or activations hold NaN or infinity.
    """
    calibrate_weights(model)
    return calibrate_activations(model, batches, task, trainer)


def calibrate_weights(model: nn.Module) -> None:
    """Fit the parameters of weights to their exact elements; no data is read.

    Raises:
        DataError: a weight holds NaN or infinity.
    """
    for weight in weight_quantizers(model):
        slot = weight.fake_quant.slot
        blocks = slot.granularity.to_blocks(weight.blocks_input())
        if not torch.isfinite(blocks).all():
            raise DataError(f"weight '{weight.name}' holds NaN or infinite values; repair the checkpoint")
        weight.fake_quant.set_qparams(fit(Samples(blocks), slot))


def calibrate_activations(
    model: nn.Module, batches: Batches, task: Task, trainer: Trainer
) -> tuple[str, ...]:
    """Fit the parameters of static activations to what one pass over the batches shows.

    An edge that no batch reaches stays in floating point and is named.

    Raises:
        DataError: an activation holds NaN or infinity.
    """
    edges = [edge for edge in edge_quantizers(model) if not edge.slot.spec.dynamic]
    if not edges:
        return ()
    seen = observe(model, edges, batches, task, trainer)
    for edge, stats in seen.items():
        check_finite(edge.name, stats)
    for slot, group in by_slot(list(seen)):
        fit_together(slot, group, [seen[edge] for edge in group])
    missed = [edge for edge in edges if edge not in seen]
    for edge in missed:
        edge.enabled = False
    return tuple(f"edge '{edge.name}' was reached by no batch and stays in floating point" for edge in missed)


def observe(
    model: nn.Module, edges: Sequence[FakeQuant], batches: Batches, task: Task, trainer: Trainer
) -> dict[FakeQuant, Statistics]:
    """Return what one pass over the batches of all processes shows at each edge that is reached."""
    seen: dict[FakeQuant, Statistics] = {}

    def start() -> None:
        for edge in edges:
            edge.statistics = needed(edge.slot).start(*process())

    def merge() -> None:
        merged = merge_over_processes({edge.name: edge.statistics for edge in edges if edge.statistics})
        seen.update({edge: merged[edge.name] for edge in edges if edge.name in merged})

    try:
        with disabled(model):  # the float model's: the same facts for every recipe
            forward_pass(model, batches, task, trainer, "calibrate", at_start=start, at_end=merge)
    finally:
        for edge in edges:
            edge.statistics = None
    return seen


def needed(slot: Slot) -> type[Statistics]:
    """Return the cheapest statistics from which both the calibrator and the quantizer of a slot can work.

    Raises:
        RecipeError: there are none.
    """
    wanted: list[type[Statistics]] = [slot.quantizer.needs]
    if slot.quantizer.uses_range:
        wanted.append(slot.calibrator.needs)
    candidates: list[type[Statistics]] = [*wanted, Histogram]
    for candidate in candidates:
        if not isabstract(candidate) and all(w is Extremes or issubclass(candidate, w) for w in wanted):
            return candidate
    raise RecipeError(
        f"calibrator '{slot.calibrator.name}' and quantizer '{slot.quantizer.name}' cannot share one pass: "
        f"they need {' and '.join(w.__name__ for w in wanted)}; use calibrator=minmax"
    )


def merge_over_processes(local: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Return, by name, what observing the batches of all processes in one would have given."""
    states = {name: stats.state() for name, stats in local.items() if stats.seen}
    gathered: list[dict[str, Any]] = [states]
    if process()[1] > 1:
        gathered = [{} for _ in range(process()[1])]
        distributed.all_gather_object(gathered, states)
    merged: dict[str, Statistics] = {}
    for rank in gathered:
        for name, state in rank.items():
            stats = type(local[name]).from_state(state)
            merged[name] = merged[name].merge(stats) if name in merged else stats
    return merged


def check_finite(name: str, stats: Statistics) -> None:
    """Refuse statistics of NaN or infinite values.

    Raises:
        DataError: names the edge.
    """
    if not stats.is_finite():
        raise DataError(
            f"activations at edge '{name}' hold NaN or infinite values; "
            "look for an overflow in the float model or a bad sample in the calibration set"
        )


def by_slot(edges: Sequence[FakeQuant]) -> Iterator[tuple[Slot, list[FakeQuant]]]:
    """Group edges that are quantized alike, so that one search serves them all."""
    groups: dict[Any, list[FakeQuant]] = {}
    for edge in edges:
        groups.setdefault(edge.slot, []).append(edge)
    yield from groups.items()


def fit_together(slot: Slot, edges: Sequence[FakeQuant], seen: Sequence[Any]) -> None:
    """Fit all edges at once: their blocks are stacked, the parameters split again."""
    qparams = fit(type(seen[0]).stack(seen), slot)
    sizes = [stats.extremes().low.shape[0] for stats in seen]
    columns = {name: torch.split(value, sizes) for name, value in qparams.extra.items()}
    scales, zero_points = torch.split(qparams.scale, sizes), torch.split(qparams.zero_point, sizes)
    for i, edge in enumerate(edges):
        extra = {name: parts[i] for name, parts in columns.items()}
        edge.set_qparams(on(edge.scale.device, QParams(scales[i], zero_points[i], extra)))


def on(device: torch.device, qparams: QParams) -> QParams:
    """Return qparams on a device."""
    extra: dict[str, Tensor] = {name: value.to(device) for name, value in qparams.extra.items()}
    return QParams(qparams.scale.to(device), qparams.zero_point.to(device), extra)


def fit(stats: Any, slot: Slot) -> QParams:  # noqa: ANN401  # whatever statistics the slot needs
    """Return the parameters a slot's calibrator and quantizer make of the statistics."""
    quantizer, spec = slot.quantizer, slot.spec
    range_ = slot.calibrator.range(stats, quantizer, spec) if quantizer.uses_range else None
    return quantizer.fit(stats, range_, spec)

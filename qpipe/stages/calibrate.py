"""Statistics, then ranges, then parameters: weights from themselves, activations from data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from inspect import isabstract
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, distributed, nn

from qpipe.cache import Entry, Shelf
from qpipe.errors import DataError, RecipeError
from qpipe.nn import FakeQuant, disabled, edge_quantizers, weight_quantizers
from qpipe.recipe import Slot
from qpipe.stages.data import process
from qpipe.stages.forward import forward_pass
from qpipe.statistics import Extremes, Histogram, Samples, Statistics
from qpipe.types import QParams, Range

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from qpipe.task import Batches, Task


def calibrate(
    model: nn.Module,
    batches: Batches,
    task: Task,
    trainer: Trainer,
    shelf: Shelf | None = None,
    also: Collection[type[Statistics]] = (),
) -> tuple[str, ...]:
    """Fit the parameters of every static quantizer in model; return what the user should know.

    Args:
        shelf: statistics of this model and these batches that were collected before.
        also: statistics to collect in the same pass, for others who will look on the shelf.

    Raises:
        DataError: weights or activations hold NaN or infinity.
    """
    calibrate_weights(model)
    return calibrate_activations(model, batches, task, trainer, shelf, also)


def calibrate_weights(model: nn.Module) -> None:
    """Fit the parameters of weights to their exact elements; no data is read.

    Raises:
        DataError: a weight holds NaN or infinity.
    """
    for weight in weight_quantizers(model):
        slot = weight.fake_quant.slot
        stats = Samples(slot.granularity.to_blocks(weight.blocks_input()))
        if not stats.is_finite():
            raise DataError(f"weight '{weight.name}' holds NaN or infinite values; repair the checkpoint")
        weight.fake_quant.set_qparams(fit(stats, slot))


def calibrate_activations(
    model: nn.Module,
    batches: Batches,
    task: Task,
    trainer: Trainer,
    shelf: Shelf | None = None,
    also: Collection[type[Statistics]] = (),
) -> tuple[str, ...]:
    """Fit the parameters of static activations to what one pass over the batches shows.

    An edge that no batch reaches stays in floating point and is named.

    Raises:
        DataError: an activation holds NaN or infinity.
    """
    edges = [edge for edge in edge_quantizers(model) if not edge.slot.spec.dynamic]
    if not edges:
        return ()
    seen = observe(model, edges, batches, task, trainer, shelf, also)
    for edge, stats in seen.items():
        check_finite(edge.name, stats)
    ranges = (shelf or Shelf()).of("ranges")
    for slot, group in by_slot(list(seen)):
        fit_together(slot, group, [seen[edge] for edge in group], ranges)
    missed = [edge for edge in edges if edge not in seen]
    for edge in missed:
        edge.enabled = False
    return tuple(f"edge '{edge.name}' was reached by no batch and stays in floating point" for edge in missed)


def observe(
    model: nn.Module,
    edges: Sequence[FakeQuant],
    batches: Batches,
    task: Task,
    trainer: Trainer,
    shelf: Shelf | None = None,
    also: Collection[type[Statistics]] = (),
) -> dict[FakeQuant, Statistics]:
    """Return what the batches of all processes show at each edge that is reached.

    One pass shows all that the shelf lacks; where it lacks nothing, no batch is read.
    """
    shelf = shelf or Shelf()
    seen = _recall(shelf, edges)
    if len(seen) < len(edges):
        with shelf.alone():  # jobs in parallel wait for the first, and find what it saw
            seen |= _recall(shelf, [edge for edge in edges if edge not in seen])
            if lacking := [edge for edge in edges if edge not in seen]:
                seen |= _collect(model, lacking, batches, task, trainer, shelf, also)
    return {edge: seen[edge] for edge in edges if seen[edge].seen}


def _recall(shelf: Shelf, edges: Sequence[FakeQuant]) -> dict[FakeQuant, Statistics]:
    found = {}
    for edge in edges:
        kind = needed(edge.slot)
        if (entry := shelf.get(_label(edge, kind))) is not None:
            found[edge] = kind.from_state(entry.tensors)
    return found


def _collect(
    model: nn.Module,
    edges: Sequence[FakeQuant],
    batches: Batches,
    task: Task,
    trainer: Trainer,
    shelf: Shelf,
    also: Collection[type[Statistics]],
) -> dict[FakeQuant, Statistics]:
    """Pass the batches through the model once and keep on the shelf what is seen."""
    kinds = {edge: _kinds(needed(edge.slot), also) for edge in edges}
    merged: dict[str, Statistics] = {}

    def start() -> None:
        for edge in edges:
            edge.statistics = Together([kind.start(*process()) for kind in kinds[edge]])

    def merge() -> None:
        parts = {
            f"{edge.name} {kind.__name__}": part
            for edge in edges
            if isinstance(edge.statistics, Together)
            for kind, part in zip(kinds[edge], edge.statistics.parts, strict=True)
        }
        merged.update(merge_over_processes(parts))

    try:
        with disabled(model):  # the float model's: the same facts for every recipe
            forward_pass(model, batches, task, trainer, "calibrate", at_start=start, at_end=merge)
    finally:
        for edge in edges:
            edge.statistics = None
    seen = {}
    for edge in edges:
        facts = {kind: merged.get(f"{edge.name} {kind.__name__}", kind.start()) for kind in kinds[edge]}
        facts[Extremes] = Extremes(*vars(next(iter(facts.values())).extremes()).values())
        for kind, stats in facts.items():
            shelf.put(_label(edge, kind), Entry(stats.state()))
        seen[edge] = facts[needed(edge.slot)]
    return seen


def _kinds(own: type[Statistics], also: Collection[type[Statistics]]) -> list[type[Statistics]]:
    """Return the statistics to collect: extremes are part of any other."""
    return [kind for kind in dict.fromkeys([own, *also]) if kind is not Extremes] or [Extremes]


def _label(edge: FakeQuant, kind: type[Statistics]) -> list[Any]:
    """Say what is observed: which call, in which blocks, how."""
    place = {key: value for key, value in vars(edge.edge).items() if key != "consumers"} if edge.edge else {}
    return [place, edge.slot.granularity, f"{kind.__module__}.{kind.__qualname__}"]


class Together(Statistics):
    """Several statistics of one tensor, fed by one pass."""

    def __init__(self, parts: Sequence[Statistics]) -> None:
        self.parts = parts

    def update(self, blocks: Tensor) -> None:
        """Feed each."""
        for part in self.parts:
            part.update(blocks)

    def merge(self, other: Self) -> Self:
        """Merge each."""
        return type(self)([part.merge(theirs) for part, theirs in zip(self.parts, other.parts, strict=True)])

    def extremes(self) -> Range:
        """Return the first one's."""
        return self.parts[0].extremes()


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


def fit_together(slot: Slot, edges: Sequence[FakeQuant], seen: Sequence[Any], shelf: Shelf) -> None:
    """Fit all edges at once: their blocks are stacked, the parameters split again.

    Args:
        shelf: of what was fitted to these statistics before.
    """
    name = [slot, [_label(edge, needed(slot)) for edge in edges]]
    if (entry := shelf.get(name)) is None:
        fitted = fit(type(seen[0]).stack(seen), slot)
        entry = Entry({"scale": fitted.scale, "zero_point": fitted.zero_point, **fitted.extra})
        shelf.put(name, entry)
    extra = {key: value for key, value in entry.tensors.items() if key not in ("scale", "zero_point")}
    qparams = QParams(entry.tensors["scale"], entry.tensors["zero_point"], extra)
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

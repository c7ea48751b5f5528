"""Find what to quantize, and put quantizers there."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qpipe.cache import Shelf
from qpipe.errors import DataError, QpipeError, RecipeError
from qpipe.graph import Recording, record, run_undisturbed, short_call, tensors
from qpipe.nn import (
    FakeQuant,
    add_edge_quantizers,
    add_weight_quantizer,
    channels_first,
    disabled,
    edge_quantizers,
    remove_weight_quantizer,
    weight_name,
    weight_quantizers,
)
from qpipe.placement import Owners, PlacedEdge, PlacedWeight
from qpipe.placement import place as place_edges
from qpipe.recipe import Recipe, Slot
from qpipe.statistics import Samples
from qpipe.taps import place_taps
from qpipe.task import Batches, Task
from qpipe.types import Edge, Role

_LEFT = "calibration or fine-tuning left it in floating point"


@dataclass(frozen=True)
class Preparation:
    """What is quantized, and how.

    Args:
        edges: in order of execution.
        weights: name, shape with output channels first, and slot; tied ones once.
        skipped: what was left in floating point, and why.
    """

    edges: tuple[tuple[Edge, Slot], ...]
    weights: tuple[tuple[str, torch.Size, Slot], ...]
    skipped: Mapping[str, str]

    def now(self, model: nn.Module) -> Preparation:
        """Return what calibration and fine-tuning made of it: tensors with the slots they have in model."""
        slots = {weight.name: weight.fake_quant.slot for weight in weight_quantizers(model)}
        edges = {edge.name: edge.slot for edge in edge_quantizers(model) if edge.enabled}
        names = [*(edge.name for edge, _ in self.edges), *(name for name, *_ in self.weights)]
        left = {name: _LEFT for name in names if name not in slots and name not in edges}
        return Preparation(
            tuple((edge, edges[edge.name]) for edge, _ in self.edges if edge.name in edges),
            tuple((name, shape, slots[name]) for name, shape, _ in self.weights if name in slots),
            {**self.skipped, **left},
        )


def place(model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> Preparation:
    """Say what prepare() would do; model stays as it is.

    Raises:
        RecipeError: a layer pattern matches nothing, or a granularity does not fit a tensor.
        DataError: there is no batch, or a weight holds NaN or infinity.
    """
    args, kwargs = _first_inputs(batches, task)
    return _Plan(model, record(model, args, kwargs), recipe).preparation()


def prepare(
    model: nn.Module, batches: Batches, task: Task, recipe: Recipe, shelf: Shelf | None = None
) -> Preparation:
    """Put quantizers into model at its weights and edges; state-dict keys and the float function stay.

    Args:
        shelf: of what is true of this model and these batches.

    Raises:
        RecipeError: a layer pattern matches nothing, or a granularity does not fit a tensor.
        DataError: there is no batch, or a weight holds NaN or infinity.
        QpipeError: the model computes something else in training mode, or once it is prepared.
    """
    args, kwargs = short_call(model, _first_inputs(batches, task), (shelf or Shelf()).of("graph"))
    recording = _record_out_of_place(model, args, kwargs)
    plan = _Plan(model, recording, recipe)
    if recipe.finetune:
        _check_training(record(model, args, kwargs, training=True), recording, plan)
    preparation = plan.preparation()
    plan.insert()
    unread = _check(model, recording, args, kwargs)
    weights = tuple(weight for weight in preparation.weights if weight[0] not in unread)
    return Preparation(preparation.edges, weights, {**preparation.skipped, **unread})


def _first_inputs(batches: Batches, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for batch in batches:
        return task.inputs(batch)
    raise DataError("the calibration set is empty; give it at least one batch")


def _record_out_of_place(model: nn.Module, args: Any, kwargs: Any) -> Recording:  # noqa: ANN401
    """Record with modules like ReLU(inplace=True) computing out of place, where that changes nothing."""
    modules = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    if not modules:
        return record(model, args, kwargs)
    expected = record(model, args, kwargs).output
    for module in modules:
        module.inplace = False  # type: ignore[assignment]
    recording = record(model, args, kwargs)
    if _same(recording.output, expected):
        return recording
    for module in modules:
        module.inplace = True  # type: ignore[assignment]
    return record(model, args, kwargs)


class _Plan:
    """What a recipe makes of a placement in one model."""

    def __init__(self, model: nn.Module, recording: Recording, recipe: Recipe) -> None:
        self.model = model
        self.ops = {*recipe.target.quantized, *recipe.target.fused}
        placement = place_edges(recording, recipe.target)
        self.skipped = dict(placement.skipped)
        _check_patterns(recipe, placement.edges, placement.weights)
        self.weights = [*self._with_slots(placement.weights, recipe)]
        self.edges = [*self._edge_slots(placement.edges, recipe)]
        self.taps = place_taps(model, recording, [edge for edge, _ in self.edges])
        self.edges = [(e, s) for e, s in self.edges if e.edge.name not in self.taps.skipped]
        self.skipped |= self.taps.skipped
        self._name_unused(placement.weights)
        self._check_tensors()

    def _with_slots(
        self, weights: tuple[PlacedWeight, ...], recipe: Recipe
    ) -> Iterator[tuple[PlacedWeight, Slot]]:
        for weight in weights:
            path, name = weight.owners[0]
            slot = recipe.slot(path, Role.WEIGHT)
            module = self.model.get_submodule(path)
            if slot is None:
                self.skipped[weight_name(path, name)] = "the recipe leaves it in floating point"
            elif isinstance(module, torch.jit.ScriptModule):
                self.skipped[weight_name(path, name)] = (
                    "it belongs to a scripted module, whose class cannot change"
                )
            else:
                yield weight, slot

    def _edge_slots(self, edges: tuple[PlacedEdge, ...], recipe: Recipe) -> Iterator[tuple[PlacedEdge, Slot]]:
        for edge in edges:
            slot = recipe.slot(edge.edge.name, Role.ACTIVATION)
            if slot is not None:
                yield edge, slot
            elif recipe.activation is not None:
                self.skipped[edge.edge.name] = "the recipe leaves it in floating point"

    def _name_unused(self, placed: tuple[PlacedWeight, ...]) -> None:
        known = {owner for weight in placed for owner in weight.owners}
        for path, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
                    continue
                if (path, name) not in known:
                    reason = "no operation that keeps its weights as codes reads it directly"
                    self.skipped.setdefault(weight_name(path, name), reason)

    def _check_tensors(self) -> None:
        for weight, slot in self.weights:
            path, name = weight.owners[0]
            parameter = self.model.get_submodule(path)._parameters[name]
            if parameter is None or not Samples(parameter.reshape(1, -1)).is_finite():
                raise DataError(
                    f"weight '{weight_name(path, name)}' holds NaN or infinite values; repair the checkpoint"
                )
            shape = _channels_first_shape(weight)
            slot.granularity.check(shape, path or name)
            _check_block(slot, shape, weight_name(path, name))
        for edge, slot in self.edges:
            for value in edge.values:
                slot.granularity.check(value.shape, edge.edge.name)

    def preparation(self) -> Preparation:
        return Preparation(
            tuple((edge.edge, slot) for edge, slot in self.edges),
            tuple((weight_name(*w.owners[0]), _channels_first_shape(w), slot) for w, slot in self.weights),
            self.skipped,
        )

    def insert(self) -> None:
        for weight, slot in self.weights:
            quantizer = FakeQuant(slot, weight_name(*weight.owners[0]))
            for path, name in weight.owners:
                module = self.model.get_submodule(path)
                add_weight_quantizer(module, name, quantizer.to(weight.device), weight.groups)
        quantizers = {
            edge.edge.name: FakeQuant(slot, edge.edge.name, edge.edge, order).to(edge.values[0].device)
            for order, (edge, slot) in enumerate(self.edges)
        }
        for path, taps in self.taps.by_owner.items():
            chosen = {key: quantizers[name] for key, name in self.taps.names.get(path, {}).items()}
            add_edge_quantizers(self.model.get_submodule(path), chosen, taps)


def _check_block(slot: Slot, shape: torch.Size, name: str) -> None:
    """Refuse blocks that codes of several values do not fill."""
    blocks = slot.granularity.to_blocks(torch.empty(shape, device="meta"))
    try:
        slot.quantizer.num_codes(blocks.shape[1])
    except RecipeError as error:
        raise RecipeError(f"'{name}': {error}") from None


def _channels_first_shape(weight: PlacedWeight) -> torch.Size:
    return channels_first(torch.empty(weight.shape, device="meta"), weight.groups).shape


def _check_patterns(recipe: Recipe, edges: tuple[PlacedEdge, ...], weights: tuple[PlacedWeight, ...]) -> None:
    names = {
        Role.ACTIVATION: [edge.edge.name for edge in edges],
        Role.WEIGHT: list(dict.fromkeys(path for weight in weights for path, _ in weight.owners)),
    }
    for rule in recipe.layers:
        candidates = [name for role in rule.edits for name in names[role]]
        if not any(fnmatchcase(name, rule.match) for name in candidates):
            close = difflib.get_close_matches(rule.match, candidates, n=3, cutoff=0.4) or candidates[:3]
            what = " or edge ".join(sorted(rule.edits, reverse=True))
            raise RecipeError(
                f"the layer pattern '{rule.match}' matches no {what} of the model; close: {', '.join(close)}"
            )


def _check_training(training: Recording, recording: Recording, plan: _Plan) -> None:
    """Refuse a model whose quantized operations in training are not those of evaluation."""
    before, after = (_quantized_calls(each, plan) for each in (recording, training))
    for path, op in dict.fromkeys([*before, *after]):
        if before[path, op] != after[path, op]:
            raise QpipeError(
                f"'{path}' calls '{op}' {before[path, op]} times in evaluation and {after[path, op]} times "
                "in training, so its edges differ; make its forward the same, or leave out finetune"
            )


def _quantized_calls(recording: Recording, plan: _Plan) -> Counter[tuple[str, str]]:
    owners, watched = Owners(recording), plan.taps.watched_ops()
    calls = [(owners.owner(call).path, call.op) for call in recording.calls]
    return Counter((path, op) for path, op in calls if op in plan.ops or op in watched.get(path, ()))


def _check(model: nn.Module, recording: Recording, args: Any, kwargs: Any) -> dict[str, str]:  # noqa: ANN401
    """Run the prepared model with its quantizers passing everything on, and see that each is passed.

    Returns:
        weights that turned out to be read past their quantizer, taken out again, with the reason.

    Raises:
        QpipeError: the model computes something else, or an edge is not passed.
    """
    passed: set[nn.Module] = set()
    edges = edge_quantizers(model)
    weights = weight_quantizers(model)
    quantizers = [*edges, *(weight.fake_quant for weight in weights)]
    with ExitStack() as stack:
        for quantizer in quantizers:
            handle = quantizer.register_forward_pre_hook(lambda module, _: passed.add(module))
            stack.callback(handle.remove)
        stack.enter_context(disabled(model))
        output = run_undisturbed(model, args, kwargs)
    if not _same(output, recording.output):
        raise QpipeError("the prepared model does not compute the float function; please report this model")
    if missed := [edge.name for edge in edges if edge not in passed]:
        raise QpipeError(f"edges {', '.join(missed)} are not reached once the model is prepared")
    unread = [weight for weight in weights if weight.fake_quant not in passed]
    for weight in unread:
        remove_weight_quantizer(weight.module, weight.parameter_name)
    return {weight.name: "its module reads it past the attribute" for weight in unread}


def _same(first: Any, second: Any) -> bool:  # noqa: ANN401
    ours, theirs = ([tensor for _, tensor in tensors(tree)] for tree in (first, second))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )

"""Where in which module's forward an edge is quantized."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qpipe.graph import Call, Invocation, Path, Recording, Value
from qpipe.nn import Taps
from qpipe.placement import Owners, PlacedEdge

_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_Marks = dict[str, list[tuple[Path, str]]]


@dataclass(frozen=True)
class PlacedTaps:
    """The taps of each module that is swapped, by its path.

    Args:
        names: of module path and key, the name of the edge.
        skipped: edges that no forward of a module can reach, with the reason.
    """

    by_owner: Mapping[str, Taps]
    names: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]

    def watched_ops(self) -> dict[str, set[str]]:
        """Return the operations whose calls are counted, by module path."""
        return {path: {op for op, _ in taps.calls} for path, taps in self.by_owner.items() if taps.calls}


def place_taps(model: nn.Module, recording: Recording, edges: Sequence[PlacedEdge]) -> PlacedTaps:
    """Find the forward in which each edge is quantized.

    A module's inputs and outputs are quantized around its forward, which costs nothing; a call inside it is
    found by counting, which needs a function mode.
    """
    owners = Owners(recording)
    inputs: _Marks = defaultdict(list)
    outputs: _Marks = defaultdict(list)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    skipped: dict[str, str] = {}
    inside: list[tuple[PlacedEdge, str]] = []
    for edge in edges:
        owner = edge.edge.owner
        if isinstance(model.get_submodule(owner), torch.jit.ScriptModule):
            skipped[edge.edge.name] = "it lies in a scripted module, whose class cannot change"
            continue
        key = _key(edge, names[owner])
        path = _border(edge, owners)
        if edge.values[0].call is None:
            inputs[owner].append((edge.values[0].path, key))
        elif path is not None:
            outputs[owner].append((path, key))
        elif edge.values[0].call.hidden:
            skipped[edge.edge.name] = "it is made by code whose operations cannot be seen"
            continue
        else:
            inside.append((edge, key))
        names[owner][key] = edge.edge.name
    calls = _call_taps(inside, owners, recording, _watched(model, inside))
    by_owner = {
        path: Taps(tuple(inputs[path]), tuple(outputs[path]), calls.get(path))
        for path in dict.fromkeys([*names, *calls])
    }
    return PlacedTaps(by_owner, names, skipped)


def _key(edge: PlacedEdge, taken: Mapping[str, str]) -> str:
    """Return a name for the quantizer among those of its module, free of dots."""
    op = edge.edge.op.split("+")[-1] if edge.values[0].call else edge.edge.name.replace(".", "_")
    key = f"{op}_{edge.edge.call}" if edge.edge.call else op
    return key if key not in taken else f"{key}_{len(taken)}"


def _border(edge: PlacedEdge, owners: Owners) -> Path | None:
    """Return the path in its owner's result at which the edge leaves it unread, the same in every forward."""
    paths = {_leaving(value, owners.owner(value.call)) for value in edge.values if value.call is not None}
    return paths.pop() if len(paths) == 1 else None


def _leaving(value: Value, owner: Invocation) -> Path | None:
    if any(call.invocation.within(owner) for call in value.consumers):
        return None
    paths = [path for path, output in owner.outputs if output is value]
    return paths[0] if len(paths) == 1 and all(isinstance(key, int) for key in paths[0]) else None


def _watched(model: nn.Module, inside: Sequence[tuple[PlacedEdge, str]]) -> set[str]:
    fast = {path for path, module in model.named_modules() if isinstance(module, _FAST_PATHS)}
    return fast | {edge.edge.owner for edge, _ in inside}


def _call_taps(
    inside: Sequence[tuple[PlacedEdge, str]], owners: Owners, recording: Recording, watched: set[str]
) -> dict[str, dict[tuple[str, int], tuple[tuple[Path, str], ...]]]:
    keys = {value: key for edge, key in inside for value in edge.values}
    taps: dict[str, dict[tuple[str, int], tuple[tuple[Path, str], ...]]] = {path: {} for path in watched}
    for frame, call, index in _counted(recording, watched):
        marks = tuple((value.path, keys[value]) for value in call.outputs if value in keys)
        if marks:
            taps[frame.path][call.op, index] = marks
    return taps


def _counted(recording: Recording, watched: set[str]) -> Iterator[tuple[Invocation, Call, int]]:
    """Yield each call with the watched forward that will see it, and its number there."""
    counts: Counter[tuple[int, str]] = Counter()
    for call in recording.calls:
        frame: Invocation | None = call.invocation
        while frame is not None and frame.path not in watched:
            frame = frame.parent
        if frame is not None and not call.hidden:
            yield frame, call, counts[id(frame), call.op]
            counts[id(frame), call.op] += 1

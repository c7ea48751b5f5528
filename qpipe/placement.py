"""Which tensors of a recorded forward pass a target keeps as codes (DESIGN §4)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qpipe.graph import Call, Invocation, Path, Recording, Value, input_name
from qpipe.types import Edge, Target

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "linear")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_OUTPUTS_LAST = ("matmul", "addmm")  # x @ weight: output channels are the last dimension
_OUTPUTS_FIRST = (*_CONVOLUTIONS, *_RECURRENT, "embedding", "embedding_bag")
_FUSES_ACTIVATION = (*_CONVOLUTIONS, *_TRANSPOSED, "matmul", "addmm", "add")
_OPERANDS = {"scaled_dot_product_attention": 3, "add": 2, **dict.fromkeys(_RECURRENT, 1)}


@dataclass(frozen=True)
class PlacedEdge:
    """An edge, with the tensors of the recording that pass it: several when its module runs several times."""

    edge: Edge
    values: tuple[Value, ...]


@dataclass(frozen=True)
class PlacedWeight:
    """A parameter that quantized operations read.

    Args:
        owners: (module path, name) of each module that shares it.
        groups: of qpipe.nn.channels_first.
    """

    owners: tuple[tuple[str, str], ...]
    groups: int
    shape: torch.Size
    device: torch.device


@dataclass(frozen=True)
class Placement:
    """Every edge and weight in order of execution, and what cannot be quantized, with the reason."""

    edges: tuple[PlacedEdge, ...]
    weights: tuple[PlacedWeight, ...]
    skipped: dict[str, str]


def place(recording: Recording, target: Target) -> Placement:
    """Decide what target keeps as codes: every tensor at most once, at the call that makes it."""
    return _Placer(recording, target).placement()


class Owners:
    """Which module's forward is said to make a call, and as the how-manieth of its kind.

    A module without children that is shared (ResNet's one ReLU) makes its calls in its caller's name.
    """

    def __init__(self, recording: Recording) -> None:
        self._shared = _shared_leaves(recording)
        counts: Counter[tuple[int, str]] = Counter()
        self._index: dict[Call, int] = {}
        for call in recording.calls:
            key = (id(self.owner(call)), call.op)
            self._index[call] = counts[key]
            counts[key] += 1

    def owner(self, call: Call) -> Invocation:
        """Return the invocation a call belongs to."""
        invocation = call.invocation
        while invocation.path in self._shared and invocation.parent is not None:
            invocation = invocation.parent
        return invocation

    def index(self, call: Call) -> int:
        """Return the how-manieth call of its operation it is for its owner, from 0."""
        return self._index[call]


def _shared_leaves(recording: Recording) -> set[str]:
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    parents: dict[str, set[str]] = defaultdict(set)
    composite = {invocation.path for invocation in recording.invocations if invocation.children}
    for invocation in recording.invocations:
        if invocation.parent is not None:
            seen[invocation.path][id(invocation.parent)] += 1
            parents[invocation.path].add(invocation.parent.path)
    return {
        path
        for path, by_parent in seen.items()
        if path not in composite and (max(by_parent.values()) > 1 or len(parents[path]) > 1)
    }


class _Placer:
    def __init__(self, recording: Recording, target: Target) -> None:
        self.recording = recording
        self.target = target
        self.owners = Owners(recording)
        self.skipped: dict[str, str] = {}
        self.ops: dict[Value, str] = {}  # what is executed as one operation, by its result

    def placement(self) -> Placement:
        wanted: dict[Value, None] = {}
        for call in self.recording.calls:
            if call.op in self.target.quantized and _computes_on_codes(call):
                wanted |= dict.fromkeys(self._inputs(call))
                result = self._result(call)
                if self.target.outputs and not self._leaves_model(result):
                    wanted[result] = None
        order = {call: i for i, call in enumerate(self.recording.calls)}
        values = sorted(wanted, key=lambda v: -1 if v.call is None else order[v.call])
        return Placement(tuple(self._edges(values)), tuple(self._weights()), self.skipped)

    def _inputs(self, call: Call) -> Iterator[Value]:
        for value in _operands(call):
            source = self._source(value)
            if source.kind == "unseen":
                self.skipped[f"input of {call.name}"] = "it is made by code whose operations cannot be seen"
            elif source.activation and source.floating:
                yield source

    def _source(self, value: Value) -> Value:
        """Go back through operations that hand codes on."""
        while value.call is not None and value.call.op in self.target.passthrough:
            value = value.call.inputs[0]
        return value

    def _result(self, call: Call) -> Value:
        """Go on to the end of what is executed as one operation with call."""
        value, ops = call.outputs[0], [call.op]
        if call.op in (*_CONVOLUTIONS, *_TRANSPOSED):
            value = self._absorbed(value, ("batch_norm",), ops)
        if call.op in _FUSES_ACTIVATION:
            value = self._absorbed(value, self.target.fused, ops)
        self.ops[value] = "+".join(ops)
        return value

    def _absorbed(self, value: Value, ops: tuple[str, ...], chain: list[str]) -> Value:
        if len(value.consumers) != 1 or value.is_output:
            return value
        (consumer,) = value.consumers
        if consumer.op not in ops or consumer.inputs[0] is not value or consumer.hidden:
            return value
        chain.append(consumer.op)
        return consumer.outputs[0]

    def _leaves_model(self, value: Value) -> bool:
        return value.is_output or any(
            self._leaves_model(output)
            for call in value.consumers
            if call.op in self.target.passthrough
            for output in call.outputs
        )

    def _readers(self, value: Value) -> Iterator[str]:
        for call in value.consumers:
            if call.op in self.target.passthrough:
                for output in call.outputs:
                    yield from self._readers(output)
            else:
                yield call.name

    def _edges(self, values: list[Value]) -> Iterator[PlacedEdge]:
        groups: dict[tuple[str, str, int, Path], list[Value]] = {}
        for value in values:
            groups.setdefault(self._key(value), []).append(value)
        names: Counter[str] = Counter()
        for (owner, _, index, _), group in groups.items():
            base = self._name(group[0])
            name = f"{base}:{names[base]}" if names[base] else base
            names[base] += 1
            consumers = dict.fromkeys(reader for value in group for reader in self._readers(value))
            edge = Edge(name, owner, self._op(group[0]), index, tuple(consumers))
            yield PlacedEdge(edge, tuple(group))

    def _key(self, value: Value) -> tuple[str, str, int, Path]:
        if value.call is None:
            return "", "input", self.recording.inputs.index(value), value.path
        owner = self.owners.owner(value.call)
        return owner.path, value.call.op, self.owners.index(value.call), value.path

    def _name(self, value: Value) -> str:
        if value.call is None:
            return input_name(value.path, len(self.recording.inputs))
        suffix = "".join(f".{key}" for key in value.path if key != 0)
        return value.call.name + suffix

    def _op(self, value: Value) -> str:
        return self.ops.get(value) or (value.call.op if value.call else "input")

    def _weights(self) -> Iterator[PlacedWeight]:
        stored = {*self.target.quantized, *self.target.weight_only}
        uses: dict[tuple[tuple[str, str], ...], set[int]] = {}
        values: dict[tuple[tuple[str, str], ...], Value] = {}
        for call in self.recording.calls:
            for value in call.inputs:
                parameter = _parameter(value)
                if parameter.kind != "parameter" or len(parameter.shape) < 2 or not parameter.floating:
                    continue
                name = ":".join(parameter.parameters[0]).removeprefix(":")
                groups = _groups(call, value) if call.op in stored else None
                values[parameter.parameters] = parameter
                if call.op in stored and groups is not None:
                    uses.setdefault(parameter.parameters, set()).add(groups)
                elif parameter is value and call.op not in self.target.passthrough:
                    self.skipped[name] = (
                        f"'{call.op}' reads it, of which target '{self.target.name}' has no codes"
                    )
        for owners, found in uses.items():
            name = ":".join(owners[0]).removeprefix(":")
            if len(found) == 1 and name not in self.skipped:
                yield PlacedWeight(owners, found.pop(), values[owners].shape, values[owners].device)
            else:
                self.skipped.setdefault(name, "operations read it with different output channels")


def _computes_on_codes(call: Call) -> bool:
    """Leave out what shares a quantized operation's name but is no such operation of the network."""
    active = [value for value in call.inputs if value.activation]
    if call.op == "add":
        return len(active) == 2 and not all(map(_is_rotated, active))  # else a mask, a position or a constant
    if call.op == "cat":
        return bool(active) and not all(map(_rotates, call.outputs[0].consumers or [call]))
    if call.op == "mean":  # of the last dimension: a norm's statistics
        return bool(active) and not (
            call.argument(1, "dim") in (-1, [-1], (-1,)) and call.argument(2, "keepdim")
        )
    return bool(active)


def _is_rotated(value: Value) -> bool:
    """Whether value is half of a rotary embedding."""
    return value.call is not None and _rotates(value.call)


def _rotates(call: Call) -> bool:
    """Whether call multiplies by computed constants: the sines and cosines of positions."""
    return call.op == "mul" and any(value.kind == "result" and not value.activation for value in call.inputs)


def _operands(call: Call) -> list[Value]:
    active = [value for value in call.inputs if value.activation]
    return active[: _OPERANDS.get(call.op, len(active))]


def _parameter(value: Value) -> Value:
    """Go back to the parameter of which value is some of the rows."""
    while (
        value.call is not None
        and value.call.op in ("chunk", "split")
        and not value.call.argument(2, "dim", 0)
    ):
        value = value.call.inputs[0]
    return value


def _groups(call: Call, weight: Value) -> int | None:
    """Return the groups that bring a weight's output channels first, None where that has no meaning."""
    if call.op in _OUTPUTS_FIRST:
        return 0
    if call.op in _TRANSPOSED:
        return int(call.argument(6, "groups", 1))
    is_right_factor = call.op in _OUTPUTS_LAST and call.inputs[-1] is weight
    return 1 if is_right_factor and len(weight.shape) == 2 else None

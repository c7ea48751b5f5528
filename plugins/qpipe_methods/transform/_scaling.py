"""Channels between linear layers and what makes their input, and what flows there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpipe import DataError, QpipeError, Task
from qpipe.graph import Call, Recording, Value, record
from qpipe.task import Batches

SAME = (
    "dropout",
    "to",
    "float",
    "contiguous",
    "clone",
    "identity",
    "type_as",
)  # hand channels on as they are
_MOVED = (
    *SAME,
    "reshape",
    "view",
    "flatten",
    "transpose",
    "permute",
    "expand",
    "getitem",
    "repeat_interleave",
)
_NORMS = ("layer_norm", "rms_norm")
_Parameters = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Junction:
    """Linear layers that read one tensor [.., C], and the parameters that its channels can be divided in.

    Args:
        readers: paths of all that read it.
        source: (module path, name) of parameters whose rows are the channels before they are repeated.
        index: [C], the source's row of each channel: heads may share one.
    """

    readers: tuple[str, ...]
    source: _Parameters
    index: Tensor

    @property
    def rows(self) -> int:
        """Channels of the source."""
        return int(self.index.max()) + 1

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest of the values [C] that share a row, [rows]."""
        return torch.zeros(self.rows, dtype=x.dtype).scatter_reduce(0, self.index, x, "amax")

    @torch.no_grad()
    def divide(self, model: nn.Module, scale: Tensor) -> None:
        """Divide the source's rows by scale [rows] > 0, multiply the readers' columns; the function stays."""
        for path, name in self.source:
            rows = held(model, path, name)
            rows.div_(scale.to(rows).reshape(-1, *[1] * (rows.dim() - 1)))
        for path in self.readers:
            weight = held(model, path, "weight")
            weight.mul_(scale[self.index].to(weight))


def held(model: nn.Module, path: str, name: str) -> Tensor:
    """Return a parameter, detached; it may be written to."""
    value = model.get_submodule(path)._parameters[name]
    if value is None:
        raise QpipeError(f"'{path}' has no parameter '{name}'")
    return value.detach()


def recorded(model: nn.Module, batches: Batches, task: Task) -> Recording:
    """Record the first batch.

    Raises:
        DataError: there is none.
    """
    for batch in batches:
        args, kwargs = task.inputs(batch)
        return record(model, args, kwargs)
    raise DataError("the calibration set is empty; give it at least one batch")


def find_junctions(model: nn.Module, recording: Recording) -> list[Junction]:
    """Return every tensor read by linear layers alone whose channels its maker can divide, in order."""
    return [*Finder(model, recording).junctions()]


class Finder:
    """Say which calls of a recording are linear layers, and what leads where."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.modules = dict(model.named_modules())
        self.calls = recording.calls
        self.times = Counter(invocation.path for invocation in recording.invocations)

    def junctions(self) -> Iterator[Junction]:
        values = dict.fromkeys(self.back(call.inputs[0], SAME) for call in self.calls if self.is_layer(call))
        for value in values:
            readers = self._readers(value)
            found = self._source(value) if readers else None
            if readers and found is not None:
                yield Junction(tuple(dict.fromkeys(readers)), *found)

    def is_layer(self, call: Call) -> bool:
        """Whether call is a linear layer's only one, with a weight nobody shares."""
        path = call.invocation.path
        is_linear = call.op == "linear" and isinstance(self.modules[path], nn.Linear)
        return is_linear and self.times[path] == 1 and all(map(self._is_own, call.inputs[1:]))

    @staticmethod
    def _is_own(value: Value) -> bool:
        return value.kind == "parameter" and len(value.parameters) == 1 and len(value.consumers) == 1

    @staticmethod
    def back(value: Value, ops: Sequence[str]) -> Value:
        """Go back through operations that hand channels on."""
        while value.call is not None and value.call.op in ops:
            value = value.call.inputs[0]
        return value

    def _readers(self, value: Value) -> list[str] | None:
        """Return the layers that read value, None if anything else does."""
        readers: list[str] = []
        for call in value.consumers:
            if self.is_layer(call) and call.inputs[0] is value:
                readers.append(call.invocation.path)
            elif call.op in SAME and not call.hidden and (more := self._readers(call.outputs[0])) is not None:
                readers += more
            else:
                return None
        return None if value.is_output else readers

    def _source(self, value: Value) -> tuple[_Parameters, Tensor] | None:
        """Return the parameters in which the channels of value can be divided, and the row of each."""
        call = value.call
        if call is None or call.hidden:
            return None
        width = value.shape[-1]
        plain = torch.arange(width)
        if self.is_layer(call):
            return tuple(value.parameters[0] for value in call.inputs[1:]), plain
        learned = [v for v in call.inputs if v.kind == "parameter"]
        if learned and (call.op == "mul" or call.op in _NORMS):
            own = all(self._is_own(v) and v.shape == (width,) for v in learned)
            return (tuple(v.parameters[0] for v in learned), plain) if own else None
        if call.op in (*SAME, "relu", "mul"):
            return self._through(call)
        return self._values(value)

    def _through(self, call: Call) -> tuple[_Parameters, Tensor] | None:
        """Go on before what is homogeneous in one of its inputs."""
        shape = call.outputs[0].shape
        for value in call.inputs:
            if len(value.consumers) == 1 and value.activation and value.shape == shape:
                found = self._source(value)
                if found is not None:
                    return found
        return None

    def _values(self, value: Value) -> tuple[_Parameters, Tensor] | None:
        """Go back through attention, which averages its values channel by channel."""
        attended = self.back(value, _MOVED).call
        if attended is None or attended.op != "scaled_dot_product_attention":
            return None
        values = attended.inputs[2]
        made = self.back(values, _MOVED).call
        if made is None or not self.is_layer(made) or not self.leads(attended.outputs[0], value):
            return None
        size, heads = values.shape[-1], attended.outputs[0].shape[1]
        rows = made.outputs[0].shape[-1]
        if value.shape[-1] != heads * size or rows % size or heads % (rows // size):
            return None
        head = torch.arange(heads) // (heads // (rows // size))
        index = (head[:, None] * size + torch.arange(size)).flatten()
        if not self.leads(made.outputs[0], values):
            return None
        return tuple(value.parameters[0] for value in made.inputs[1:]), index

    @staticmethod
    def leads(start: Value, end: Value) -> bool:
        """Whether nothing but what leads to end reads start."""
        while start is not end:
            if len(start.consumers) != 1 or start.is_output:
                return False
            start = start.consumers[0].outputs[0]
        return True


def watch_inputs(
    model: nn.Module,
    batches: Batches,
    task: Task,
    junctions: Sequence[Junction],
    see: Callable[[int, Tensor], None],
) -> None:
    """Run the batches and hand what reaches each junction to see(number, [N, C])."""

    def hook(number: int) -> Callable[..., None]:
        return lambda module, args: see(number, args[0].detach().flatten(0, -2))

    with ExitStack() as stack, torch.no_grad():
        for number, junction in enumerate(junctions):
            reader = model.get_submodule(junction.readers[0])
            stack.callback(reader.register_forward_pre_hook(hook(number)).remove)
        for batch in batches:
            args, kwargs = task.inputs(batch)
            model(*args, **kwargs)


def check_kept(model: nn.Module, recording: Recording, batches: Batches, task: Task, name: str) -> None:
    """See that the model still computes what was recorded.

    Raises:
        QpipeError: it does not.
    """
    before, after = task.compared(recording.output), task.compared(recorded(model, batches, task).output)
    error = (after - before).norm() / before.norm()
    if not error < 1e-3:
        raise QpipeError(
            f"{name} changed the float model by {error:.1e}; leave it out, and report this model"
        )

"""Who calls what, and who feeds whom: recorded from one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from qpipe.cache import Entry, Shelf
from qpipe.calls import batch_size, some_samples
from qpipe.ops import is_in_place, op_name, seen_through

_FEW = 2  # samples that show what a model does
Path = tuple[Any, ...]


@dataclass(eq=False)
class Value:
    """A tensor as it was at one point of the forward pass.

    Args:
        call: what made it; None for inputs, parameters and constants.
        path: where it lies in the call's result, or in the model's (args, kwargs).
        kind: 'input', 'parameter', 'constant', 'result' or 'unseen' (made by code no mode sees).
        depends: on an input of the model.
        activation: real numbers the network computes from its inputs, not a mask, a position or a constant.
        parameters: (module path, name) of the parameter it is, one for each module that shares it.
        consumers: calls that read it, in order.
        is_output: whether the model returns it.
    """

    call: Call | None
    path: Path
    kind: str
    shape: torch.Size
    floating: bool
    device: torch.device
    depends: bool = False
    activation: bool = False
    parameters: tuple[tuple[str, str], ...] = ()
    consumers: list[Call] = field(default_factory=list)
    is_output: bool = False


@dataclass(eq=False)
class Invocation:
    """One forward of one module."""

    path: str
    parent: Invocation | None
    outputs: list[tuple[Path, Value]] = field(default_factory=list)
    children: list[Invocation] = field(default_factory=list)

    def within(self, other: Invocation) -> bool:
        """Whether this is other, or runs inside it."""
        ancestor: Invocation | None = self
        while ancestor is not None and ancestor is not other:
            ancestor = ancestor.parent
        return ancestor is other


@dataclass(eq=False)
class Call:
    """One call of one operation.

    Args:
        invocation: the module forward that made it.
        hidden: made by code no mode sees; only its module's output is known.
    """

    op: str
    invocation: Invocation
    inputs: tuple[Value, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Value, ...] = ()
    hidden: bool = False

    @property
    def name(self) -> str:
        """Return the path of the module whose result this is, or that path and the operation."""
        path = self.invocation.path
        is_module = any(value in self.outputs for _, value in self.invocation.outputs)
        if is_module and not self.invocation.children and path:
            return path
        return f"{path}.{self.op}" if path else self.op

    def argument(self, index: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return an argument that is no tensor, given by position or by name."""
        return self.kwargs.get(name, self.args[index] if index < len(self.args) else default)


@dataclass
class Recording:
    """All calls of one forward pass, in order of execution."""

    calls: list[Call]
    invocations: list[Invocation]
    inputs: list[Value]
    output: Any


def record(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool = False
) -> Recording:
    """Run model once and say who called what and who fed whom; buffers and random state are restored."""
    recorder = _Recorder(model)
    with _undisturbed(model, training), torch.no_grad(), recorder.hooked(model):
        recorder.enter_inputs(args, kwargs, [*inspect.signature(model.forward).parameters])
        with recorder:
            output = model(*args, **kwargs)
    for _, tensor in tensors(output):
        if tensor in recorder.values:
            recorder.values[tensor].is_output = True
    return Recording(recorder.calls, recorder.invocations, recorder.inputs, output)


def short_call(model: nn.Module, call: tuple[Any, Any], shelf: Shelf) -> tuple[Any, Any]:
    """Cut a call, (args, kwargs), to two samples if the model does the same with them as with all.

    Args:
        shelf: keeps the answer; without a store nothing is cut, as trying costs more than it saves once.
    """
    if not shelf.store or batch_size(call) <= 2 * _FEW:
        return call
    short = some_samples(call, _FEW)
    if (entry := shelf.get("call")) is None:
        entry = Entry(data=_steps(model, short) == _steps(model, call))
        shelf.put("call", entry)
    return short if entry.data else call


def _steps(model: nn.Module, call: tuple[Any, Any]) -> list[tuple[str, str]] | None:
    try:
        return [(made.invocation.path, made.op) for made in record(model, *call).calls]
    except Exception:  # whatever a stranger's model raises at a size it was not made for
        return None


def run_undisturbed(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return model's output in evaluation; buffers, modes and random state are restored."""
    with _undisturbed(model, training=False), torch.no_grad():
        return model(*args, **kwargs)


def tensors(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:  # noqa: ANN401
    """Yield every tensor in nested tuples, lists and dicts, with its path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from tensors(item, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from tensors(item, (*path, index))


def input_name(path: Path, num_args: int) -> str:
    """Return the printable name of an input: 'input', 'input.0', 'input.pixel_values'."""
    where = path[1:]
    if path[0] == 0 and num_args == 1:
        where = where[1:]
    return ".".join(["input", *map(str, where)])


@contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.train(training)
        with torch.random.fork_rng(sorted(d for d in devices if d is not None)):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
        for module, flag in flags.items():
            module.training = flag


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.calls: list[Call] = []
        self.invocations: list[Invocation] = []
        self.inputs: list[Value] = []
        self.stack: list[Invocation] = []
        self._note_state(model)

    def _note_state(self, model: nn.Module) -> None:
        owners: dict[Tensor, list[tuple[str, str]]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(parameter, []).append((path, name))
            for tensor in (*module._buffers.values(), *vars(module).values()):
                if isinstance(tensor, Tensor):
                    self._enter(tensor, "constant")
        for parameter, names in owners.items():
            self._enter(parameter, "parameter").parameters = tuple(names)

    def _enter(self, tensor: Tensor, kind: str, path: Path = (), call: Call | None = None) -> Value:
        value = Value(call, path, kind, tensor.shape, tensor.is_floating_point(), tensor.device)
        self.values[tensor] = value
        return value

    def enter_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        for path, tensor in tensors((tuple(args), dict(kwargs))):
            value = self._enter(tensor, "input", path)
            value.depends = True
            word = names[path[1]] if path[0] == 0 and path[1] < len(names) else path[1]
            is_mask = any("mask" in str(key) for key in (word, *path[2:]))
            value.activation = value.floating and not is_mask
            self.inputs.append(value)

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Follow which module's forward is running."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                enter = module.register_forward_pre_hook(self._entering(path), prepend=True)
                leave = module.register_forward_hook(self._leaving())
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def _entering(self, path: str) -> Any:  # noqa: ANN401
        def hook(*_: Any) -> None:  # noqa: ANN401
            parent = self.stack[-1] if self.stack else None
            self.stack.append(Invocation(path, parent))
            self.invocations.append(self.stack[-1])
            if parent is not None:
                parent.children.append(self.stack[-1])

        return hook

    def _leaving(self) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: Any, result: Any) -> None:  # noqa: ANN401
            invocation = self.stack[-1]
            for path, tensor in tensors(result):
                if tensor not in self.values and tensor.is_floating_point():
                    inputs = tuple(self._value(t) for _, t in tensors(args))
                    call = Call(type(module).__name__.lower(), invocation, inputs, hidden=True)
                    self._finish(call, [(path, tensor)])
                if tensor in self.values:
                    invocation.outputs.append((path, self.values[tensor]))
            self.stack.pop()

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return seen_through(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.stack:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:  # noqa: ANN401
        op = op_name(func)
        changed = args[0] if op == "setitem" else None
        read = list(tensors((args, kwargs)))
        in_place = changed is not None or is_in_place(func, kwargs)
        known = {id(tensor) for _, tensor in read}
        made = [
            (p, t)
            for p, t in tensors(result if changed is None else changed)
            if in_place or id(t) not in known
        ]
        if made:
            inputs = tuple(self._value(tensor) for _, tensor in read)
            rest, options = tree_map_only(Tensor, lambda _: None, (args, kwargs))  # no activation is kept
            self._finish(Call(op, self.stack[-1], inputs, rest, options, hidden=changed is not None), made)

    def _value(self, tensor: Tensor) -> Value:
        if tensor not in self.values:
            value = self._enter(tensor, "unseen")
            value.activation = value.depends = value.floating
        known: Value = self.values[tensor]
        return known

    def _finish(self, call: Call, made: Sequence[tuple[Path, Tensor]]) -> None:
        self.calls.append(call)
        for value in dict.fromkeys(call.inputs):
            value.consumers.append(call)
        depends = any(value.depends for value in call.inputs)
        learned = depends and any(value.kind == "parameter" for value in call.inputs)
        active = learned or any(value.activation for value in call.inputs)
        outputs = []
        for path, tensor in made:
            value = self._enter(tensor, "result", path, call)
            value.depends = depends
            value.activation = active and (tensor.is_floating_point() or tensor.is_complex())
            outputs.append(value)
        call.outputs = tuple(outputs)

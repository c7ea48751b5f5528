"""Fake-quantization inside a model: the module that rounds, and the class swap that puts it in place."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qpipe.errors import QpipeError
from qpipe.ops import REBINDING, is_in_place, op_name, seen_through
from qpipe.recipe import Slot
from qpipe.statistics import Samples, Statistics
from qpipe.types import Edge, QParams, QuantSpec

_EXTRA = "extra_"


Rule = Callable[[Tensor, QParams, QuantSpec], Tensor]


def on_blocks(
    slot: Slot, x: Tensor, qparams: QParams, rule: Rule | None = None, training: bool = False
) -> Tensor:
    """Fake-quantize x block by block; where one scale serves all of it, as it stands.

    Args:
        rule: stands in for the quantizer's fake_quantize.
        training: round as the quantizer does while a model trains; otherwise to nearest.
    """
    quantizer = slot.quantizer if training else slot.quantizer.settled()
    granularity, spec = slot.granularity, slot.spec
    rule = rule or quantizer.fake_quantize
    if qparams.scale.numel() == 1 and quantizer.is_affine(spec):  # broadcast: no view, no copy
        ones = [1] * x.dim()
        return rule(x, QParams(qparams.scale.reshape(ones), qparams.zero_point.reshape(ones)), spec)
    return granularity.from_blocks(rule(granularity.to_blocks(x), qparams, spec), x.shape)


class FakeQuant(nn.Module):
    """Quantize and dequantize one tensor; hold its parameters and, while calibrating, its statistics.

    Args:
        slot: how.
        name: of the edge, or 'module.path:parameter' of the weight, for messages.
        edge: the activation it stands at; None for a weight.
        order: how many edges are executed before it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, slot: Slot, name: str, edge: Edge | None = None, order: int = 0) -> None:
        super().__init__()
        self.training = False  # placed in a model in eval mode; train() of the model turns it on
        self.slot = slot
        self.name = name
        self.edge = edge
        self.order = order
        self.enabled = True
        self.statistics: Statistics | None = None  # set: observe and pass the tensor on unchanged
        self.learner: nn.Module | None = None  # set while training: fake-quantizes in the quantizer's place
        self.register_buffer("scale", torch.empty(0, 1))
        self.register_buffer("zero_point", torch.empty(0, 1))

    @property
    def calibrated(self) -> bool:
        """Whether parameters were fitted, or are taken from each tensor as it passes."""
        return self.slot.spec.dynamic or self.scale.numel() > 0

    def qparams(self) -> QParams:
        """Return the fitted parameters."""
        names = [n for n in (*self._buffers, *self._parameters) if n.startswith(_EXTRA)]
        zero_point = self.zero_point.expand_as(self.scale)
        return QParams(self.scale, zero_point, {n.removeprefix(_EXTRA): getattr(self, n) for n in names})

    def set_qparams(self, qparams: QParams) -> None:
        """Keep fitted parameters as buffers, so that they are saved and move with the model.

        The zero points of a symmetric quantizer are all 0; one is kept.
        """
        zero_point = qparams.zero_point[:1] if self.slot.spec.symmetric else qparams.zero_point
        self.register_buffer("scale", qparams.scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        for name, value in qparams.extra.items():
            self.register_buffer(_EXTRA + name, value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Observe x, or return it rounded to its levels; computed in float32 whatever autocast says."""
        if not x.is_floating_point():
            return x
        if self.statistics is not None:
            self.statistics.update(self.slot.granularity.to_blocks(x.detach()))
            return x
        if not self.enabled:
            return x
        if not self.calibrated:
            raise QpipeError(f"'{self.name}' was never calibrated; run calibrate before the quantized model")
        with torch.autocast(x.device.type, enabled=False):
            return self._fake_quantize(x if x.dtype is torch.float64 else x.float()).to(x.dtype)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if self.learner is not None:
            learned: Tensor = self.learner(x)
            return learned
        qparams = self.dynamic_qparams(x) if self.slot.spec.dynamic else self.qparams()
        return on_blocks(self.slot, x, qparams, training=self.training)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x as blocks [B, N], integers in a floating dtype."""
        quantizer = self.slot.quantizer.settled()
        return quantizer.quantize(self.slot.granularity.to_blocks(x), self.qparams(), self.slot.spec)

    def dynamic_qparams(self, x: Tensor) -> QParams:
        """Fit parameters to x itself, exactly; no gradient flows through them."""
        with torch.no_grad():
            stats = Samples(self.slot.granularity.to_blocks(x))
            quantizer, spec = self.slot.quantizer, self.slot.spec
            ranged = self.slot.calibrator.range(stats, quantizer, spec) if quantizer.uses_range else None
            return quantizer.fit(stats, ranged, spec)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Take parameters of any shape, so that a calibrated state loads into an uncalibrated model."""
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            ours = name in ("scale", "zero_point") or name.startswith(_EXTRA)
            if key.startswith(prefix) and ours and name not in self._parameters:
                self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the slot."""
        return ", ".join(f"{key}={value}" for key, value in self.slot.describe().items())


EDGES = "activation_quantizers"
_WEIGHT = "_quantizer"
_Path = tuple[Any, ...]  # keys that lead into nested tuples, lists and dicts; () is the whole


class EdgeQuantizers(nn.ModuleDict):
    """Hold the activation quantizers of a module; called as a layer, it does nothing."""

    def forward(self, x: Any) -> Any:  # noqa: ANN401
        """Return x, so that a model that calls its children one after the other stays what it is."""
        return x


@dataclass(frozen=True)
class Taps:
    """Where a swapped module applies its activation quantizers; each by its key in `activation_quantizers`.

    Args:
        inputs: of (args, kwargs), with the path of the tensor.
        outputs: of the result, with the path of the tensor.
        calls: of the n-th call of an operation in one forward, with the path in its result.
            None: calls need not be watched; empty: watched, which keeps torch's fused fast paths off.
    """

    inputs: tuple[tuple[_Path, str], ...] = ()
    outputs: tuple[tuple[_Path, str], ...] = ()
    calls: Mapping[tuple[str, int], tuple[tuple[_Path, str], ...]] | None = None


class ChannelClip(nn.Module):
    """Clip each channel to its own range: ReLU6 after its channels were scaled.

    Args:
        low, high: [C, 1, ...], as many dimensions as a sample has.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        """Clip x [B, C, ...]."""
        return torch.clamp(x, self.low, self.high)


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter that is seen through a quantizer.

    Args:
        name: 'module.path:parameter'.
        module: owns the parameter, and the quantizer as '<parameter>_quantizer'.
    """

    name: str
    module: nn.Module
    parameter_name: str
    fake_quant: FakeQuant

    def blocks_input(self) -> Tensor:
        """Return the parameter as its quantizer sees it: output channels first, detached."""
        parameter = self.module._parameters[self.parameter_name]
        if parameter is None:
            raise QpipeError(f"'{self.name}' was dropped when the model was converted")
        return channels_first(parameter.detach(), _meta(self.module).layouts[self.parameter_name])

    @property
    def parameter(self) -> nn.Parameter | None:
        """Return the parameter itself; None once converted."""
        return self.module._parameters[self.parameter_name]

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Write x, output channels first, into the parameter."""
        if self.parameter is not None:
            self.parameter.copy_(channels_first(x, _meta(self.module).layouts[self.parameter_name]))


def weight_quantizers(model: nn.Module) -> list[QuantizedWeight]:
    """Return every quantized parameter; tied ones once for each module, with one quantizer."""
    return [
        QuantizedWeight(weight_name(path, name), module, name, quantizer)
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name in _meta(module).layouts
        if isinstance(quantizer := module._modules.get(name + _WEIGHT), FakeQuant)
    ]


def edge_quantizers(model: nn.Module) -> list[FakeQuant]:
    """Return the activation quantizers in order of execution."""
    found = [m for m in model.modules() if isinstance(m, FakeQuant) and m.edge is not None]
    return sorted(found, key=lambda m: m.order)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute the float function of a prepared model, calibrated or not."""
    quantizers = [(m, m.enabled) for m in model.modules() if isinstance(m, FakeQuant)]
    try:
        for quantizer, _ in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in quantizers:
            quantizer.enabled = enabled


@contextmanager
def observing(statistics: Mapping[FakeQuant, Statistics]) -> Iterator[None]:
    """Collect statistics where they are given, and pass those tensors on unchanged."""
    try:
        for quantizer, stats in statistics.items():
            quantizer.statistics = stats
        yield
    finally:
        for quantizer in statistics:
            quantizer.statistics = None


def weight_name(path: str, parameter_name: str) -> str:
    """Return what a weight is called in messages and reports."""
    return f"{path}:{parameter_name}" if path else parameter_name


def channels_first(weight: Tensor, groups: int) -> Tensor:
    """Exchange input and output channels within each of groups; its own inverse; 0 groups: leave as it is.

    [G * I, O, *] -> [G * O, I, *]: the layout of transposed convolutions, and of x @ weight with one group.
    """
    if not groups:
        return weight
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def add_weight_quantizer(module: nn.Module, name: str, quantizer: FakeQuant, groups: int = 0) -> None:
    """Show module's parameter only through quantizer; its state-dict key stays.

    Args:
        groups: of channels_first.
    """
    layouts = {**(_meta(module).layouts if isinstance(module, QuantizedModule) else {}), name: groups}
    _swap(module, layouts=layouts)
    module.add_module(name + _WEIGHT, quantizer)


def remove_weight_quantizer(module: nn.Module, name: str) -> None:
    """Undo add_weight_quantizer."""
    layouts = {other: groups for other, groups in _meta(module).layouts.items() if other != name}
    _swap(module, layouts=layouts)
    del module._modules[name + _WEIGHT]


def add_edge_quantizers(module: nn.Module, quantizers: Mapping[str, FakeQuant], taps: Taps) -> None:
    """Let module's forward quantize its inputs, outputs and calls where taps say."""
    _swap(module, taps=taps)
    if quantizers:
        module.add_module(EDGES, EdgeQuantizers(quantizers))


@dataclass(frozen=True)
class _Meta:
    layouts: Mapping[str, int] = field(default_factory=dict)
    taps: Taps | None = None


class QuantizedModule(nn.Module):
    """Base of the swapped classes; `__class__` of a module becomes `Quantized<its class>`."""

    _qpipe: _Meta
    _qpipe_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Rebuild the class where it is unpickled or copied: it cannot be found by name."""
        return _revive, (self._qpipe_base, self._qpipe), object.__getstate__(self)


def _meta(module: nn.Module) -> _Meta:
    meta = module.__dict__.get("_qpipe")
    return meta if isinstance(meta, _Meta) else _Meta()


def _swap(module: nn.Module, **changes: Any) -> None:  # noqa: ANN401  # fields of _Meta
    base = module._qpipe_base if isinstance(module, QuantizedModule) else type(module)
    old = _meta(module)
    meta = _Meta(changes.get("layouts", old.layouts), changes.get("taps", old.taps))
    module.__dict__["_qpipe"] = meta
    module.__class__ = _class_for(base, meta)


def _class_for(base: Any, meta: _Meta) -> type[nn.Module]:  # noqa: ANN401
    return quantized_class(base, tuple(meta.layouts), meta.taps is not None)


def _revive(base: type[nn.Module], meta: _Meta) -> nn.Module:
    cls = _class_for(base, meta)
    return cls.__new__(cls)


@functools.cache
def quantized_class(base: Any, parameters: tuple[str, ...], tapped: bool) -> type[nn.Module]:  # noqa: ANN401
    """Return the sibling of base that shows parameters through their quantizers and applies its taps."""
    body: dict[str, Any] = {"__module__": base.__module__, "_qpipe_base": base}
    if tapped:
        body["forward"] = _tapped_forward(base)
    if issubclass(base, nn.RNNBase):
        body |= {"_flat_weights": _flat_weights(parameters), "flatten_parameters": _keep_apart}
    else:
        body |= {name: _seen_through_quantizer(name) for name in parameters}
    if issubclass(base, nn.Sequential):
        body |= {"__iter__": _layers, "__len__": _num_layers}
    elif issubclass(base, nn.ModuleDict):
        body |= {
            "__iter__": _names,
            "__len__": _num_layers,
            "keys": _keys,
            "items": _items,
            "values": _values,
        }
    return type(f"Quantized{base.__name__}", (QuantizedModule, base), body)


def _seen_through_quantizer(name: str) -> property:
    def get(module: QuantizedModule) -> Any:  # noqa: ANN401
        try:
            return _quantized_parameter(module, name)
        except AttributeError as error:  # nn.Module.__getattr__ would hand out the float parameter instead
            raise RuntimeError(f"quantizing parameter '{name}' failed: {error}") from error

    return property(get)


def _quantized_parameter(module: QuantizedModule, name: str) -> Any:  # noqa: ANN401  # None once converted
    x = module._parameters[name]
    quantizer = module._modules[name + _WEIGHT]
    groups = module._qpipe.layouts[name]
    if quantizer is None:
        return x
    _frames.stack.append(None)
    try:
        if not groups:
            return quantizer(x)
        return channels_first(quantizer(x if x is None else channels_first(x, groups)), groups)
    finally:
        _frames.stack.pop()


def _flat_weights(parameters: tuple[str, ...]) -> property:
    """Show the weights of a recurrent module, which reads a list instead of its attributes."""

    def get(module: Any) -> list[Tensor | None]:  # noqa: ANN401
        return [
            _quantized_parameter(module, name) if name in parameters else module._parameters.get(name)
            for name in module._flat_weights_names
        ]

    return property(get, lambda _, value: None)


def _keep_apart(_: nn.RNNBase) -> None:
    """Quantized weights are made anew in each forward: there is no one chunk of memory to keep them in."""


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return iter(_values(module))


def _num_layers(module: nn.Module) -> int:
    return len(_values(module))


def _names(module: nn.Module) -> Iterator[str]:
    return iter(_keys(module))


def _keys(module: nn.Module) -> list[str]:
    return [name for name in module._modules if name != EDGES]


def _values(module: nn.Module) -> list[Any]:
    return [child for name, child in module._modules.items() if name != EDGES]


def _items(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, child) for name, child in module._modules.items() if name != EDGES]


def _tapped_forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        taps, quantizers = self._qpipe.taps, self._modules.get(EDGES)
        for path, key in taps.inputs:
            args, kwargs = _edit((args, kwargs), path, quantizers[key])
        if taps.calls is None:
            result = base.forward(self, *args, **kwargs)
        else:
            result = _watched(base, self, args, kwargs)
        for path, key in taps.outputs:
            result = _edit(result, path, quantizers[key])
        return result

    return forward


def _watched(base: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    mode = _Calls(module._qpipe.taps.calls, module._modules.get(EDGES))
    _frames.stack.append(mode)
    try:
        with mode:
            return base.forward(module, *args, **kwargs)
    finally:
        _frames.stack.pop()


class _Frames(threading.local):
    """The watched forwards that are running, innermost last; None hides what a quantizer computes."""

    def __init__(self) -> None:
        self.stack: list[_Calls | None] = []


_frames = _Frames()


def calls_so_far() -> dict[str, int]:
    """Return what the innermost watched forward has called, by operation; to leave calls out, add them."""
    frame = _frames.stack[-1] if _frames.stack else None
    return {} if frame is None else frame.counts


class _Calls(TorchFunctionMode):
    """Count the calls of one forward and quantize the results of some."""

    def __init__(self, taps: Mapping[tuple[str, int], Any], quantizers: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.taps = taps
        self.quantizers = quantizers
        self.ops = {op for op, _ in taps}
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Quantize the result where a tap stands at this call of this forward."""
        kwargs = kwargs or {}
        if _frames.stack[-1] is not self:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return seen_through(func)(*args, **kwargs)
        op = op_name(func)
        if op not in self.ops:
            return func(*args, **kwargs)
        call = self.counts.get(op, 0)
        self.counts[op] = call + 1
        taps = self.taps.get((op, call))
        return func(*args, **kwargs) if taps is None else self._quantized(func, args, kwargs, taps)

    def _quantized(self, func: Any, args: Any, kwargs: Any, taps: Any) -> Any:  # noqa: ANN401
        in_place, rebound = is_in_place(func, kwargs), REBINDING.get(func)
        target: Any = args[0] if args else None
        if rebound is not None:  # a += b: the caller goes on with what is returned
            result = rebound(*args, **kwargs).to(target.dtype)
        elif in_place:  # on a copy: the operation may save its result for the backward pass
            result = func(target.clone(), *args[1:], **kwargs)
        else:
            result = func(*args, **kwargs)
        for path, key in taps:
            result = _edit(result, path, self.quantizers[key])
        return target.copy_(result) if in_place and rebound is None else result


def _edit(tree: Any, path: _Path, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    """Return tree with the tensor at path changed; nothing is changed in place."""
    if not path:
        _frames.stack.append(None)
        try:
            return change(tree)
        finally:
            _frames.stack.pop()
    try:
        changed = _edit(tree[path[0]], path[1:], change)
    except (IndexError, KeyError):
        raise QpipeError(
            f"the model was prepared with an input {path[0]!r} that this call lacks; pass the same arguments"
        ) from None
    if isinstance(tree, dict):
        return {**tree, path[0]: changed}
    items = [changed if i == path[0] else item for i, item in enumerate(tree)]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)

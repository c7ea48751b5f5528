"""What ONNX Runtime has to see in a QDQ graph to compute it on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

_BIAS_CODES = 2**30  # half of int32, the other half is left to the sum
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_PASSTHROUGH = (
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_Array = np.ndarray[Any, Any]


def tidy(model: ir.Model) -> None:
    """Drop what the tracer noted (stack traces, file names), keep constants in one place."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.DeduplicateInitializersPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "qpipe", ""


def fuse(model: ir.Model) -> None:
    """Rewrite a QDQ graph, its function kept, into the patterns ONNX Runtime fuses."""
    for node in [*model.graph]:
        if node.op_type == "ReduceMean":
            _name_average(model.graph, node)
        elif node.op_type == "Pad":
            _pad_inside(model.graph, node)
    for node in [*model.graph]:
        if node.op_type in _PASSTHROUGH:
            _move_codes(model.graph, node)
    for node in [*model.graph]:
        if node.op_type in ("Relu", "Clip"):
            _drop_saturated(model.graph, node)
        elif node.op_type in ("Conv", "Gemm"):
            _quantize_bias(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)


def strip(model: ir.Model) -> None:
    """Turn a QDQ graph into the float graph of the same architecture: no codes, no rounding."""
    for node in [*model.graph]:
        if node.op_type == "QuantizeLinear":
            for dequantize in node.outputs[0].consumers():
                _bypass(model.graph, dequantize, node.inputs[0])
            model.graph.remove(node, safe=True)
    for node in [*model.graph]:
        weight = _dequantizer(node.outputs[0])
        if weight is not None and weight.codes is not None:
            values = (weight.centred() * weight.along_axis(weight.scale)).astype(np.float32)
            _bypass(model.graph, node, _initializer(model.graph, f"{_name(node.inputs[0])}.float", values))
    passes.RemoveUnusedNodesPass()(model)


def name_dimensions(model: ir.Model) -> None:
    """Call the dimensions of inputs and outputs that vary 'batch' and, after it, 'length'."""
    names: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and value.shape is not None:
                symbol = str(dim.value)
                default = {0: "batch", 1: "length"}.get(axis, symbol) if value.is_graph_input() else symbol
                value.shape[axis] = names.setdefault(symbol, default)


def _name_average(graph: ir.Graph, node: ir.Node) -> None:
    """Say GlobalAveragePool where a mean is one; a dropped dimension is dropped behind the quantizer."""
    x, axes = node.inputs[0], _constant(node.inputs[1] if len(node.inputs) > 1 else None)
    if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
        return
    if {int(axis) % 4 for axis in axes.flat} != {2, 3}:
        return
    pool = ir.node("GlobalAveragePool", [x])
    graph.insert_before(node, pool)
    _replace(graph, node.outputs[0], pool.outputs[0])
    if not _attribute(node, "keepdims", 1):
        _flatten_behind(graph, pool)
    graph.remove(node, safe=True)


def _flatten_behind(graph: ir.Graph, pool: ir.Node) -> None:
    last = pool
    while len(users := last.outputs[0].consumers()) == 1 and users[0].op_type in _QDQ:
        last = users[0]
        last.outputs[0].shape = None
    flatten = ir.node("Flatten", [last.outputs[0]], {"axis": 1})
    _replace(graph, last.outputs[0], flatten.outputs[0], but=flatten)
    graph.insert_after(last, flatten)


def _move_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Let an operation that only moves values move codes: it is dequantized behind, not before."""
    before = _dequantizer(node.inputs[0])
    if before is None or before.codes is not None or len(node.outputs) != 1 or before.scale.size != 1:
        return
    behind = ir.node("DequantizeLinear", [node.outputs[0], *before.node.inputs[1:]])
    _replace(graph, node.outputs[0], behind.outputs[0], but=behind)
    graph.insert_after(node, behind)
    codes = before.node.inputs[0]
    node.replace_input_with(0, codes)
    if codes is not None and codes.dtype is not None:
        node.outputs[0].dtype = codes.dtype
    if not before.node.outputs[0].uses():
        graph.remove(before.node, safe=True)


def _pad_inside(graph: ir.Graph, node: ir.Node) -> None:
    """Let the convolutions behind a border of zeros add it themselves."""
    convolutions, pads = node.outputs[0].consumers(), _constant(node.inputs[1])
    value = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if _attribute(node, "mode", "constant") != "constant" or (value is not None and value.any()):
        return
    if pads is None or not convolutions or any(node.inputs[3:]):
        return
    before, after = pads[: pads.size // 2], pads[pads.size // 2 :]
    if before[:2].any() or after[:2].any() or any(conv.op_type != "Conv" for conv in convolutions):
        return
    border = np.concatenate([before[2:], after[2:]])
    for conv in convolutions:
        own = np.array(_attribute(conv, "pads", 0) or np.zeros_like(border))
        conv.attributes["pads"] = ir.AttrInt64s("pads", [int(size) for size in own + border])
        conv.attributes.pop("auto_pad", None)
    _bypass(graph, node, node.inputs[0])


def _drop_saturated(graph: ir.Graph, node: ir.Node) -> None:
    """Drop a Relu or Clip whose bounds the saturation of the quantizers behind it implies."""
    quantizers, bounds = node.outputs[0].consumers(), _bounds(node)
    if bounds is not None and quantizers and all(_saturates(q, *bounds) for q in quantizers):
        _bypass(graph, node, node.inputs[0])


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    low, high = (_constant(value) for value in (*node.inputs[1:], None, None)[:2])
    if any(value is not None and _constant(value) is None for value in node.inputs[1:]):
        return None
    return -np.inf if low is None else float(low), np.inf if high is None else float(high)


def _saturates(node: ir.Node, low: float, high: float) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return False
    scale, zero_point = _constant(node.inputs[1]), _constant(node.inputs[2])
    if scale is None or zero_point is None or scale.size != 1:
        return False
    limits, offset = np.iinfo(zero_point.dtype), float(zero_point.item())
    codes = [np.rint(np.float32(bound) / scale.item()) + offset for bound in (low, high)]
    return bool(codes[0] <= limits.min and codes[1] >= limits.max)


def _quantize_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Give a bias as int32 codes in units of the products.

    ONNX Runtime does so itself only where a quantizer follows. A channel too weak for its bias (all of its
    weights 0, say) gets a larger scale: the codes would not fit.
    """
    x, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    bias = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None or bias.ndim != 1 or x is None or weight is None or weight.codes is None:
        return
    scale = weight.scale
    if x.scale.size != 1 or scale.size not in (1, bias.size) or _attribute(node, "beta", 1.0) != 1.0:
        return
    needed = np.abs(bias.astype(np.float64)) / (x.scale.item() * _BIAS_CODES)
    if (needed > scale).any():
        if scale.size == 1:
            return
        scale = np.maximum(scale, needed.astype(scale.dtype))
        _set_scale(graph, weight, scale)
    steps = np.broadcast_to((x.scale.item() * scale.reshape(-1)).astype(np.float32), bias.shape)
    codes = np.rint(bias.astype(np.float64) / steps).astype(np.int32)
    node.replace_input_with(2, _dequantized_bias(graph, node, codes, steps))


def _dequantized_bias(graph: ir.Graph, node: ir.Node, codes: _Array, scale: _Array) -> ir.Value:
    name = f"{_name(node.inputs[2])}.codes"
    parts = {name: codes, f"{name}.scale": scale, f"{name}.zero_point": np.zeros_like(codes)}
    dequantize = ir.node(
        "DequantizeLinear", [_initializer(graph, *part) for part in parts.items()], {"axis": 0}
    )
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _set_scale(graph: ir.Graph, weight: _Dequantizer, scale: _Array) -> None:
    """Write a weight's codes in larger steps."""
    name = f"{_name(weight.node.inputs[0])}.coarser"
    centred = np.rint(weight.centred() * weight.along_axis(weight.scale / scale))
    codes = (centred + weight.along_axis(weight.zero_point)).astype(weight.zero_point.dtype)
    parts = {name: codes, f"{name}.scale": scale}
    for index, part in enumerate(parts.items()):
        weight.node.replace_input_with(index, _initializer(graph, *part))


@dataclass(frozen=True)
class _Dequantizer:
    """A DequantizeLinear: its constants; codes is None where they are computed."""

    node: ir.Node
    codes: _Array | None
    scale: _Array
    zero_point: _Array

    def along_axis(self, x: _Array) -> _Array:
        """Shape x, one value a channel, so that it multiplies the codes."""
        rank = 0 if self.codes is None else self.codes.ndim
        axis = _attribute(self.node, "axis", 1) % rank if x.size > 1 else None
        return x.reshape([-1 if dim == axis else 1 for dim in range(rank)])

    def centred(self) -> _Array:
        """Return codes - zero_point."""
        codes = np.zeros(0) if self.codes is None else self.codes
        return codes.astype(np.float32) - self.along_axis(self.zero_point)


def _dequantizer(value: ir.Value | None) -> _Dequantizer | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale, zero_point = (_constant(value) for value in (*node.inputs, None)[:3])
    if scale is None:
        return None
    return _Dequantizer(node, codes, scale, np.zeros((), np.int8) if zero_point is None else zero_point)


def _bypass(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> None:
    if value is not None:
        _replace(graph, node.outputs[0], value)
    graph.remove(node, safe=True)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    if old.dtype is not None:
        new.dtype = old.dtype
    for node, index in [*old.uses()]:
        if node is not but:
            node.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.shape, new.name, old.name = old.shape, old.name, f"{old.name}.old"
            graph.outputs[index] = new


def _initializer(graph: ir.Graph, name: str, array: _Array) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value | None) -> _Array | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _attribute(node: ir.Node, name: str, default: float | str) -> Any:  # noqa: ANN401  # an attribute's value
    return node.attributes[name].value if name in node.attributes else default


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""

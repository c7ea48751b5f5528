"""What ONNX Runtime has to see in a QDQ graph to compute it on codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from qpipe_onnx import _dynamic
from qpipe_onnx._nodes import (
    Array,
    Dequantizer,
    attribute,
    bypass,
    constant,
    dequantizer,
    initializer,
    name_of,
    replace,
)

_BIAS_CODES = 2**30  # half of int32, the other half is left to the sum
_CLIPS = ("Clip", "Max", "Min", "Relu")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
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


def tidy(model: ir.Model) -> None:
    """Drop what the tracer noted (stack traces, file names), keep constants in one place."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ClearMetadataAndDocStringPass()(model)
    _fold_casts(model.graph)
    _dynamic.name(model.graph)
    passes.DeduplicateInitializersPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "qpipe", ""


def _fold_casts(graph: ir.Graph) -> None:
    """Store zero points in the type of their codes, which the tracer leaves to be computed."""
    for node in [*graph]:
        value = constant(node.inputs[0]) if node.op_type == "Cast" else None
        if value is not None:
            dtype = ir.DataType(attribute(node, "to", 0)).numpy()
            bypass(graph, node, initializer(graph, f"{name_of(node.inputs[0])}.cast", value.astype(dtype)))


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
    for node in reversed([*model.graph]):  # of two clips the last first: the other then meets the quantizer
        if node.op_type in _CLIPS:
            _clip_codes(model.graph, node)
        elif node.op_type in ("Conv", "Gemm"):
            _quantize_bias(model.graph, node)
    _dynamic.lower(model.graph)
    for node in [*model.graph]:
        _keep_float(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)


def strip(model: ir.Model) -> None:
    """Turn a QDQ graph into the float graph of the same architecture: no codes, no rounding."""
    _dynamic.strip(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    for node in [*model.graph]:
        if node.op_type == "QuantizeLinear":
            for dequantize in node.outputs[0].consumers():
                bypass(model.graph, dequantize, node.inputs[0])
            model.graph.remove(node, safe=True)
    for node in [*model.graph]:
        weight = dequantizer(node.outputs[0])
        if weight is not None and weight.codes is not None:
            values = (weight.centred() * weight.along_axis(weight.scale)).astype(np.float32)
            bypass(model.graph, node, initializer(model.graph, f"{name_of(node.inputs[0])}.float", values))
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
    x, axes = node.inputs[0], constant(node.inputs[1] if len(node.inputs) > 1 else None)
    if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
        return
    if {int(axis) % 4 for axis in axes.flat} != {2, 3}:
        return
    pool = ir.node("GlobalAveragePool", [x])
    graph.insert_before(node, pool)
    replace(graph, node.outputs[0], pool.outputs[0])
    if not attribute(node, "keepdims", 1):
        _flatten_behind(graph, pool)
    graph.remove(node, safe=True)


def _flatten_behind(graph: ir.Graph, pool: ir.Node) -> None:
    last = pool
    while len(users := last.outputs[0].consumers()) == 1 and users[0].op_type in _QDQ:
        last = users[0]
        last.outputs[0].shape = None
    flatten = ir.node("Flatten", [last.outputs[0]], {"axis": 1})
    replace(graph, last.outputs[0], flatten.outputs[0], but=flatten)
    graph.insert_after(last, flatten)


def _move_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Let an operation that only moves values move codes: it is dequantized behind, not before."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is None or not _has_one_scale(before) or len(node.outputs) != 1:
        return
    behind = ir.node("DequantizeLinear", [node.outputs[0], *before.inputs[1:]])
    replace(graph, node.outputs[0], behind.outputs[0], but=behind)
    graph.insert_after(node, behind)
    codes = before.inputs[0]
    node.replace_input_with(0, codes)
    node.outputs[0].type = codes.type if codes is not None else None
    if not before.outputs[0].uses():
        graph.remove(before, safe=True)


def _has_one_scale(node: ir.Node) -> bool:
    """Say whether a node dequantizes what is computed, with a stored scale or that of the whole tensor."""
    if node.op_type != "DequantizeLinear" or constant(node.inputs[0]) is not None:
        return False
    scale, value = constant(node.inputs[1]), node.inputs[1]
    source = value.producer() if value is not None else None
    is_dynamic = source is not None and source.op_type == "DynamicQuantizeLinear"
    return is_dynamic or (scale is not None and scale.size == 1)


def _pad_inside(graph: ir.Graph, node: ir.Node) -> None:
    """Let the convolutions behind a border of zeros add it themselves."""
    convolutions, pads = node.outputs[0].consumers(), constant(node.inputs[1])
    value = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if attribute(node, "mode", "constant") != "constant" or (value is not None and value.any()):
        return
    if pads is None or not convolutions or any(node.inputs[3:]):
        return
    before, after = pads[: pads.size // 2], pads[pads.size // 2 :]
    if before[:2].any() or after[:2].any() or any(conv.op_type != "Conv" for conv in convolutions):
        return
    border = np.concatenate([before[2:], after[2:]])
    for conv in convolutions:
        own = np.array(attribute(conv, "pads", 0) or np.zeros_like(border))
        conv.attributes["pads"] = ir.AttrInt64s("pads", [int(size) for size in own + border])
        conv.attributes.pop("auto_pad", None)
    bypass(graph, node, node.inputs[0])


def _clip_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Clip codes instead of what is rounded to them: rounding keeps order, so the codes are the same.

    A bound that the saturation of the quantizer implies is dropped; one that differs by channel, which
    equalized layers have, would leave the operation before it in floating point.
    """
    quantizers, bounds = [*node.outputs[0].consumers()], _bounds(node)
    if bounds is None or not quantizers or any(_codes_of(q, bounds[1][0]) is None for q in quantizers):
        return
    x, (low, high) = bounds
    for quantize in quantizers:
        for op, bound in (("Min", high), ("Max", low)):  # behind the same node: the last comes first
            _clip_behind(graph, quantize, op, _codes_of(quantize, bound))
    bypass(graph, node, x)


def _bounds(node: ir.Node) -> tuple[ir.Value | None, tuple[Array, Array]] | None:
    """Return what a node clips, and the least and the largest value it lets pass."""
    low, high = np.array(-np.inf, np.float32), np.array(np.inf, np.float32)
    if node.op_type == "Relu":
        return node.inputs[0], (np.zeros_like(low), high)
    if node.op_type in ("Max", "Min") and len(node.inputs) == 2:
        for x, given in (node.inputs, reversed(node.inputs)):
            if (bound := constant(given)) is not None:
                return x, (bound, high) if node.op_type == "Max" else (low, bound)
    if node.op_type == "Clip" and all(map(_is_absent_or_constant, node.inputs[1:])):
        least, largest = (*map(constant, node.inputs[1:]), None, None)[:2]
        return node.inputs[0], (low if least is None else least, high if largest is None else largest)
    return None


def _is_absent_or_constant(value: ir.Value | None) -> bool:
    return value is None or constant(value) is not None


def _codes_of(quantize: ir.Node, bound: Array) -> Array | None:
    """Return what a quantizer with one scale makes of a bound."""
    if quantize.op_type != "QuantizeLinear" or len(quantize.inputs) < 3:
        return None
    scale, zero_point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    if scale is None or zero_point is None or scale.size != 1:
        return None
    limits = np.iinfo(zero_point.dtype)
    codes = np.rint(np.asarray(bound, np.float32) / scale.item()) + float(zero_point.item())
    clipped: Array = codes.clip(limits.min, limits.max).astype(zero_point.dtype)
    return clipped


def _clip_behind(graph: ir.Graph, quantize: ir.Node, op: str, bound: Array | None) -> None:
    """Let an operation clip a quantizer's codes; it takes over their name, by which a proof finds them."""
    if bound is None:
        return
    limits, codes = np.iinfo(bound.dtype), quantize.outputs[0]
    if (bound == (limits.max if op == "Min" else limits.min)).all():
        return
    clip = ir.node(op, [codes, initializer(graph, f"{codes.name}.{op.lower()}", bound)])
    replace(graph, codes, clip.outputs[0], but=clip)
    clip.outputs[0].name, codes.name = codes.name, f"{codes.name}.unclipped"
    graph.insert_after(quantize, clip)


def _quantize_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Give a bias as int32 codes in units of the products.

    ONNX Runtime does so itself only where a quantizer follows. A channel too weak for its bias (all of its
    weights 0, say) gets a larger scale: the codes would not fit.
    """
    x, weight = dequantizer(node.inputs[0]), dequantizer(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None or bias.ndim != 1 or x is None or weight is None or weight.codes is None:
        return
    scale = weight.scale
    if x.scale.size != 1 or scale.size not in (1, bias.size) or attribute(node, "beta", 1.0) != 1.0:
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


def _dequantized_bias(graph: ir.Graph, node: ir.Node, codes: Array, scale: Array) -> ir.Value:
    name = f"{name_of(node.inputs[2])}.codes"
    parts = {name: codes, f"{name}.scale": scale, f"{name}.zero_point": np.zeros_like(codes)}
    dequantize = ir.node(
        "DequantizeLinear", [initializer(graph, *part) for part in parts.items()], {"axis": 0}
    )
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def float_weight(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the stored weight that a layer multiplies by in floating point, None where it has none."""
    value = node.inputs[1] if node.op_type in _PRODUCTS else None
    stored = value.const_value if value is not None else None
    return stored if stored is not None and stored.dtype == ir.DataType.FLOAT else None


def _keep_float(graph: ir.Graph, node: ir.Node) -> None:
    """Dequantize the input of a layer in floating point with its one scale repeated, once a channel.

    Between a DequantizeLinear of one scale and a QuantizeLinear ONNX Runtime rounds float weights to int8 of
    its own (WeightBiasQuantization).
    """
    weight, x = float_weight(node), dequantizer(node.inputs[0])
    if weight is None or x is None or x.scale.size != 1:
        return
    axis, size = _repeatable(node, weight)
    stem = name_of(x.node.inputs[0])
    parts = {f"{stem}.scale.{size}": x.scale, f"{stem}.zero_point.{size}": x.zero_point}
    repeated = [initializer(graph, name, np.repeat(part, size)) for name, part in parts.items()]
    behind = ir.node("DequantizeLinear", [x.node.inputs[0], *repeated], {"axis": axis})
    graph.insert_before(node, behind)
    node.replace_input_with(0, behind.outputs[0])


def _repeatable(node: ir.Node, weight: ir.TensorProtocol) -> tuple[int, int]:
    """Return an axis of a layer's input and its size: the channels, of one channel a longer axis if known."""
    shape = weight.numpy().shape
    if node.op_type == "MatMul":
        return -1, shape[-2]
    if node.op_type == "Gemm":
        return 1 - attribute(node, "transA", 0), shape[attribute(node, "transB", 0)]
    channels = shape[0] if node.op_type == "ConvTranspose" else shape[1] * attribute(node, "group", 1)
    dims = [*(node.inputs[0].shape or ())] if node.inputs[0] is not None else []
    known = [(axis, dim) for axis, dim in enumerate(dims) if axis > 1 and isinstance(dim, int) and dim > 1]
    return (1, channels) if channels > 1 or not known else known[0]


def _set_scale(graph: ir.Graph, weight: Dequantizer, scale: Array) -> None:
    """Write a weight's codes in larger steps."""
    name = f"{name_of(weight.node.inputs[0])}.coarser"
    centred = np.rint(weight.centred() * weight.along_axis(weight.scale / scale))
    codes = (centred + weight.along_axis(weight.zero_point)).astype(weight.zero_point.dtype)
    parts = {name: codes, f"{name}.scale": scale}
    for index, part in enumerate(parts.items()):
        weight.node.replace_input_with(index, initializer(graph, *part))

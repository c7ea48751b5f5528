"""Ranges taken while running, in the form ONNX Runtime multiplies by: uint8 codes behind a DequantizeLinear.

One range a tensor is DynamicQuantizeLinear. One a token divides by the row's scale, rounds to steps of 1, and
multiplies the product by the scale, so that the codes themselves have one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qpipe import DynamicActivation
from qpipe_onnx._nodes import attribute, bypass, initializer, replace
from qpipe_onnx._weights import weight_of

CODES, SCALE, ZERO_POINT = ".codes", ".scale", ".zero_point"
_LEAST = 2.0**-23  # of a scale; qpipe.functional.scale_eps(8)
MIDDLE = 128


@contextmanager
def placed(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Let every DynamicActivation be traced as one operation; yield how that one is translated."""
    operation = _operation()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DynamicActivation):
                spec = module.fake_quant.slot.spec
                levels = float(spec.quant_max - spec.quant_min) if module.per_token else 0.0
                vars(module)["forward"] = _Placed(operation, levels)
                stack.callback(vars(module).pop, "forward")
        yield {torch.ops.qpipe_onnx.dynamic.default: _translated}


class _Placed:
    def __init__(self, operation: Any, levels: float) -> None:  # noqa: ANN401
        self.operation = operation
        self.levels = levels

    def __call__(self, x: Tensor) -> Any:  # noqa: ANN401
        return self.operation(x, self.levels) if x.is_floating_point() else x


@cache
def _operation() -> Any:  # noqa: ANN401  # a custom operation
    """Register what stands for a DynamicActivation in a traced graph; it is never computed."""

    @torch.library.custom_op("qpipe_onnx::dynamic", mutates_args=())
    def dynamic(x: Tensor, levels: float) -> Tensor:
        return x.clone()

    @dynamic.register_fake
    def _(x: Tensor, levels: float) -> Tensor:
        return torch.empty_like(x)

    return dynamic


def _translated(x: Any, levels: float) -> Any:  # noqa: ANN401  # onnxscript's values
    """Say the operation in ONNX; levels: how many steps a token's range has, 0: one range for the tensor."""
    import onnxscript

    op: Any = onnxscript.opset18
    if not levels:
        return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))
    largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    scale = op.Max(op.Div(largest, op.Constant(value_float=levels / 2)), op.Constant(value_float=_LEAST))
    one = op.Constant(value_float=1.0)
    middle = op.Cast(op.Constant(value_int=MIDDLE), to=ir.DataType.UINT8.value)
    codes = op.QuantizeLinear(op.Div(x, scale), one, middle)
    return op.Mul(op.DequantizeLinear(codes, one, middle), scale)


def name(graph: ir.Graph) -> None:
    """Call what the n-th quantizer with dynamic ranges makes dynamic_n.codes, .scale and .zero_point."""
    turn = count()
    for node in graph:
        if node.op_type == "DynamicQuantizeLinear":
            stem = f"dynamic_{next(turn)}"
            for value, part in zip(node.outputs, (CODES, SCALE, ZERO_POINT), strict=True):
                value.name = stem + part
        elif (scale := _token_scale(node)) is not None:
            stem = f"dynamic_{next(turn)}"
            node.outputs[0].name, scale.name = stem + CODES, stem + SCALE


def lower(graph: ir.Graph) -> None:
    """Write products of dynamic codes and weights as ONNX Runtime fuses them."""
    for node in [*graph]:
        if node.op_type not in ("Gemm", "MatMul") or weight_of(node.inputs[1]) is None:
            continue
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if _is_dequantizer(producer) and not attribute(node, "transA", 0):
            _lower(graph, node, node.inputs[0], None)
        elif producer is not None and producer.op_type == "Mul" and not attribute(node, "transA", 0):
            codes, scale = producer.inputs
            if codes is not None and _is_dequantizer(codes.producer()):
                _lower(graph, node, codes, scale)


def strip(graph: ir.Graph) -> None:
    """Take the rounding out again."""
    for node in [*graph]:
        if node.op_type == "DynamicQuantizeLinear":
            for dequantize in [*node.outputs[0].consumers()]:
                bypass(graph, dequantize, node.inputs[0])
        elif _token_scale(node) is not None and node.inputs[0] is not None:
            x, (dequantize,) = node.inputs[0].producer(), node.outputs[0].consumers()
            for scaled in [*dequantize.outputs[0].consumers()]:
                bypass(graph, scaled, x.inputs[0] if x is not None else None)


def _token_scale(node: ir.Node) -> ir.Value | None:
    """Return the scale of each row where a QuantizeLinear is what _translated makes of a token's."""
    if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
        return None
    division, users = node.inputs[0].producer(), [*node.outputs[0].consumers()]
    if division is None or division.op_type != "Div" or len(users) != 1:
        return None
    scaled = [*users[0].outputs[0].consumers()]
    is_token = any(user.op_type == "Mul" and user.inputs[1] is division.inputs[1] for user in scaled)
    return division.inputs[1] if is_token else None


def _is_dequantizer(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return any(str(value.name).startswith("dynamic_") for value in node.inputs if value is not None)


def _lower(graph: ir.Graph, node: ir.Node, x: ir.Value | None, scale: ir.Value | None) -> None:
    """Make a product of a node, and behind it multiply by scale and add a bias where there are any."""
    if node.op_type == "Gemm" and scale is None:
        new = _integer_product(graph, node)
    else:
        weight, new = node.inputs[1], []
        if attribute(node, "transB", 0):
            new.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = new[-1].outputs[0]
        new.append(ir.node("MatMul", [x, weight]))
        if scale is not None:
            new.append(ir.node("Mul", [new[-1].outputs[0], scale]))
    if len(node.inputs) > 2:
        new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
    graph.insert_before(node, new)
    replace(graph, node.outputs[0], new[-1].outputs[0])
    graph.remove(node, safe=True)


def _integer_product(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Say Gemm as MatMulInteger: of MatMul and Add ONNX Runtime would make a Gemm in floating point again."""
    weight, x = weight_of(node.inputs[1]), node.inputs[0].producer() if node.inputs[0] is not None else None
    if weight is None or x is None:
        return []
    codes, source = weight.codes(), weight.source
    parts = {
        ".columns": codes.T if attribute(node, "transB", 0) else codes,
        ".columns.scale": source.scale.reshape(-1),
        ".columns.zero_point": source.zero_point.reshape(-1).astype(codes.dtype),
    }
    columns, scale, zero_point = (
        initializer(graph, weight.name + name, part) for name, part in parts.items()
    )
    product = ir.node("MatMulInteger", [x.inputs[0], columns, x.inputs[2], zero_point])
    real = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT.value})
    steps = ir.node("Mul", [x.inputs[1], scale])
    return [product, real, steps, ir.node("Mul", [real.outputs[0], steps.outputs[0]])]

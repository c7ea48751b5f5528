"""Reading and editing an ONNX graph: constants, dequantizers, replacements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dequantizer:
    """A DequantizeLinear: its constants; codes is None where they are computed."""

    node: ir.Node
    codes: Array | None
    scale: Array
    zero_point: Array

    def along_axis(self, x: Array) -> Array:
        """Shape x, one value a channel, so that it multiplies the codes."""
        rank = 0 if self.codes is None else self.codes.ndim
        axis = attribute(self.node, "axis", 1) % rank if x.size > 1 else None
        return x.reshape([-1 if dim == axis else 1 for dim in range(rank)])

    def centred(self) -> Array:
        """Return codes - zero_point."""
        codes = np.zeros(0) if self.codes is None else self.codes
        return codes.astype(np.float32) - self.along_axis(self.zero_point)


def dequantizer(value: ir.Value | None) -> Dequantizer | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale, zero_point = (_stored(value) for value in (*node.inputs, None)[:3])
    if scale is None:
        return None
    return Dequantizer(node, codes, scale, np.zeros((), np.int8) if zero_point is None else zero_point)


def _stored(value: ir.Value | None) -> Array | None:
    """Return a constant, or what turning one round gives: a table's columns, and their scales."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Squeeze", "Transpose"):
        return constant(value)
    stored = constant(node.inputs[0])
    if stored is None:
        return None
    if node.op_type == "Squeeze":
        return stored.squeeze()
    return stored.transpose(attribute(node, "perm", 0) or None)


def bypass(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> None:
    if value is not None:
        replace(graph, node.outputs[0], value)
    graph.remove(node, safe=True)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    if old.dtype is not None:
        new.dtype = old.dtype
    for node, index in [*old.uses()]:
        if node is not but:
            node.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.shape, new.name, old.name = old.shape, old.name, f"{old.name}.old"
            graph.outputs[index] = new


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.require(array, requirements="C"), name=name))
    graph.register_initializer(value)
    return value


def constant(value: ir.Value | None) -> Array | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def attribute(node: ir.Node, name: str, default: float | str) -> Any:  # noqa: ANN401  # an attribute's value
    return node.attributes[name].value if name in node.attributes else default


def name_of(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""

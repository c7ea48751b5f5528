"""Weights stored as packed codes and tables, decoded as ONNX Runtime loads the file: it folds constants.

What it then multiplies by is float32: such a file is small, not fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qpipe import TabledWeight
from qpipe_onnx._nodes import attribute, bypass, initializer, name_of

_DOMAIN = "qpipe"
_WORD = ir.DataType.UINT32.value
_CODES = ".codes"


@contextmanager
def placed(model: nn.Module) -> Iterator[None]:
    """Let the unpacking of every TabledWeight be traced as one operation, which the tracer cannot compute."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, TabledWeight):
                vars(module)["unpacked"] = _traced
                stack.callback(vars(module).pop, "unpacked")
        yield


def _traced(packed: Tensor, num_bits: int, count: int) -> Tensor:
    attributes: dict[str, Any] = {"num_bits": num_bits, "count": count}
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Unpack", (packed,), attributes, dtype=torch.int64, shape=(count,), version=1
    )


def expand(model: ir.Model) -> None:
    """Say Unpack in operations of ONNX."""
    for node in [*model.graph]:
        if node.domain == _DOMAIN:
            _expand(model.graph, node, *(attribute(node, name, 0) for name in ("num_bits", "count")))
    model.opset_imports.pop(_DOMAIN, None)


def _expand(graph: ir.Graph, node: ir.Node, num_bits: int, count: int) -> None:
    """Find each code in the bytes [groups of eight, num_bits], of at most two of which it is a part."""
    tape = ir.tape.Tape()
    first_bits = np.arange(8) * num_bits

    def word(name: str, values: Any) -> ir.Value:  # noqa: ANN401
        return initializer(graph, f"unpack{num_bits}.{name}", np.array(values, np.uint32))

    def byte(which: int) -> ir.Value:
        at = np.minimum(first_bits // 8 + which, num_bits - 1)
        index = initializer(graph, f"unpack{num_bits}.byte{which}", at)
        return tape.op("Cast", [tape.op("Gather", [node.inputs[0], index], {"axis": 1})], {"to": _WORD})

    high = tape.op("BitShift", [byte(1), word("eight", 8)], {"direction": "LEFT"})
    words = tape.op("BitwiseOr", [byte(0), high])
    each = tape.op("BitShift", [words, word("shift", first_bits % 8)], {"direction": "RIGHT"})
    each = tape.op("BitwiseAnd", [each, word("mask", 2**num_bits - 1)])
    flat = tape.op("Reshape", [each, initializer(graph, "unpack.flat", np.array([-1]))])
    ends = [initializer(graph, f"unpack.{end}", np.array([end])) for end in (0, count)]
    kept = tape.op("Cast", [tape.op("Slice", [flat, *ends])], {"to": ir.DataType.INT64.value})
    graph.insert_before(node, tape.nodes)
    bypass(graph, node, kept)


def decoded(graph: ir.Graph) -> Mapping[ir.Value, str]:
    """Return the values computed from stored ones alone, packed codes among them, with the name of those."""
    found = {
        value: name_of(value)
        for value in graph.initializers.values()
        if name_of(value).endswith(_CODES) and all(node.op_type == "Gather" for node in value.consumers())
    }
    known = {*graph.initializers.values()}
    for node in graph:
        if all(value is None or value in known for value in node.inputs):
            known |= {*node.outputs}
            names = [found[value] for value in node.inputs if value in found]
            found |= dict.fromkeys(node.outputs, names[0]) if names else {}
    return found

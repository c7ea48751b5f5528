"""Weights that operations read in floating point, stored in the few bits and the form ONNX Runtime keeps.

It multiplies by codes (MatMulNBits) where they stand as [inputs, outputs] behind a DequantizeLinear whose
blocks run along the inputs, a power of two of 16 or more each, or whose scales are one an output or one in
all. Rows are looked up as codes only by an operation of its own (GatherBlockQuantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from qpipe_onnx._nodes import (
    Array,
    Dequantizer,
    attribute,
    constant,
    dequantizer,
    initializer,
    name_of,
    replace,
)

FACTOR, ROWS = ".factor", ".rows"  # behind the name of codes: as a matrix multiplies by them, as a table
_MOVES = ("Identity", "Reshape", "Slice", "Transpose")
_LEAST_BLOCK = 16
_CONTRIB = "com.microsoft"
_MIDDLE = 128  # GatherBlockQuantized takes no signed bytes
_TYPES: tuple[tuple[Any, int, int, int], ...] = (  # bits, least code, and least opset, narrowest first
    (ml_dtypes.int2, 2, -2, 25),
    (ml_dtypes.uint2, 2, 0, 25),
    (ml_dtypes.int4, 4, -8, 21),
    (ml_dtypes.uint4, 4, 0, 21),
)


def store(model: ir.Model) -> None:
    """Rewrite every weight of a float operation; what has no better form keeps its DequantizeLinear."""
    read = [(node, weight) for node in model.graph if (weight := _read_in_float(node)) is not None]
    tables = {
        weight.name: _store_rows(model, node, weight) for node, weight in read if node.op_type == "Gather"
    }
    for node, weight in read:
        if node.op_type in ("Gemm", "MatMul"):
            _store_factor(model, node, weight, tables.get(weight.name))
        elif node.op_type != "Gather":
            _narrow(model, weight)
    passes.RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Table:
    """Rows that are looked up, as they are stored.

    Args:
        parts: codes, scales and zero points.
        codes: [rows, columns].
        block_size: columns that share a scale.
    """

    parts: list[ir.Value]
    codes: Array
    block_size: int


@dataclass(frozen=True)
class Weight:
    """A constant behind a DequantizeLinear, and how it is moved before it is read."""

    source: Dequantizer
    moves: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """Return what its codes are called."""
        return name_of(self.source.node.inputs[0])

    def codes(self) -> Array:
        """Return the codes as they are read."""
        return self._moved(np.zeros(0) if self.source.codes is None else self.source.codes)

    def blocks(self) -> Array:
        """Return the index of the scale of every code, as they are read."""
        codes, scale = self.source.codes, self.source.scale
        shape = () if codes is None else codes.shape
        return self._moved(
            np.broadcast_to(self.source.along_axis(np.arange(scale.size, dtype=np.int32)), shape)
        )

    def _moved(self, x: Array) -> Array:
        for node in self.moves:
            x = _moved(node, x)
        return x


def weight_of(value: ir.Value | None) -> Weight | None:
    """Return the weight a value is, None where it is none."""
    moves: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _MOVES:
        moves.insert(0, node)
        value = node.inputs[0]
    source = dequantizer(value)
    return Weight(source, tuple(moves)) if source is not None and source.codes is not None else None


def _read_in_float(node: ir.Node) -> Weight | None:
    if node.op_type == "Gather":
        return weight_of(node.inputs[0])
    if node.op_type in (*_MOVES, "DequantizeLinear", "QuantizeLinear") or len(node.inputs) < 2:
        return None
    return None if _is_rounded(node.inputs[0]) else weight_of(node.inputs[1])


def _is_rounded(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def layer(node: ir.Node, tables: Mapping[ir.Value, str]) -> tuple[str, ir.Value, ir.Value] | None:
    """Return the weight, the input and the output of a node that reads a weight in floating point.

    The weight is named like the module that holds its codes; a bias added behind belongs to the output.

    Args:
        tables: the values that codes are decoded to, with the name of those codes.
    """
    x, read = [*node.inputs, None, None][:2]
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        x, read = read, x
    weight = _read_in_float(node)
    if node.op_type == "GatherBlockQuantized":
        stem = name_of(read)
    else:
        stem = weight.name if weight is not None else tables.get(read, "") if read is not None else ""
    name, is_codes, _ = stem.partition(".codes")
    if not is_codes or x is None or x.is_initializer() or x in tables:
        return None
    users = node.outputs[0].consumers()
    bias = users[0].inputs[1] if len(users) == 1 and users[0].op_type == "Add" else None
    biased = node.op_type == "MatMul" and bias is not None and bias.is_initializer()
    output = (users[0] if biased else node).outputs[0]
    if any(user.op_type == "QuantizeLinear" for user in output.consumers()):
        return None  # an edge, whose codes are compared
    return name, x, output


def _moved(node: ir.Node, x: Array) -> Array:
    constants = [constant(value) for value in node.inputs[1:]]
    if node.op_type == "Transpose":
        return x.transpose(attribute(node, "perm", 0) or None)
    if node.op_type == "Reshape" and constants[0] is not None:
        return x.reshape([int(size) for size in constants[0]])
    if node.op_type == "Slice":
        starts, ends, axes, steps = (*constants, None, None)[:4]
        return x[_slices(x.ndim, starts, ends, axes, steps)]
    return x


def _slices(
    rank: int, starts: Array | None, ends: Array | None, axes: Array | None, steps: Array | None
) -> tuple[slice, ...]:
    starts, ends = (np.zeros(0) if x is None else x for x in (starts, ends))
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), int) if steps is None else steps
    found = {
        int(axis) % rank: slice(*map(int, s)) for axis, *s in zip(axes, starts, ends, steps, strict=True)
    }
    return tuple(found.get(axis, slice(None)) for axis in range(rank))


def _store_factor(model: ir.Model, node: ir.Node, weight: Weight, table: _Table | None) -> None:
    """Give MatMul its right factor as [inputs, outputs]; make MatMul and Add of a Gemm.

    Args:
        table: of the same codes, which are then stored once.
    """
    codes, blocks = weight.codes(), weight.blocks()
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        codes, blocks = codes.T, blocks.T
    scaled = attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0
    layout = _by_input(blocks) if codes.ndim == 2 else None
    if layout is None or scaled or attribute(node, "transA", 0):
        _narrow(model, weight)
        return
    index, attributes = layout
    if table is not None and _is_transposed(table, codes, attributes):
        parts = _turned(model.graph, node, table, attributes)
    else:
        parts = _parts(model, weight, codes, index)
    factor = ir.node("DequantizeLinear", parts, attributes)
    model.graph.insert_before(node, factor)
    if node.op_type == "MatMul":
        node.replace_input_with(1, factor.outputs[0])
        return
    last = product = ir.node("MatMul", [node.inputs[0], factor.outputs[0]])
    if len(node.inputs) > 2:
        last = ir.node("Add", [product.outputs[0], node.inputs[2]])
    model.graph.insert_before(node, [product] if last is product else [product, last])
    replace(model.graph, node.outputs[0], last.outputs[0])
    model.graph.remove(node, safe=True)


def _is_transposed(table: _Table, codes: Array, attributes: Mapping[str, int]) -> bool:
    rows_share = table.block_size >= table.codes.shape[1] and attributes == {"axis": 1}
    blocks_share = table.block_size == attributes.get("block_size")
    return (rows_share or blocks_share) and np.array_equal(table.codes, codes.T)


def _turned(graph: ir.Graph, node: ir.Node, table: _Table, attributes: Mapping[str, int]) -> list[ir.Value]:
    """Return the parts of a table as a matrix multiplies by them; ONNX Runtime turns them as it loads."""
    codes, *scales = table.parts
    turns = [_transposed(codes), *map(_flattened if attributes == {"axis": 1} else _transposed, scales)]
    for turn, part in zip(turns, table.parts, strict=True):
        turn.outputs[0].name = f"{part.name}.turned"
    graph.insert_before(node, turns)
    return [turn.outputs[0] for turn in turns]


def _transposed(part: ir.Value) -> ir.Node:
    return ir.node("Transpose", [part], {"perm": [1, 0]})


def _flattened(part: ir.Value) -> ir.Node:
    return ir.node("Squeeze", [part])


def _store_rows(model: ir.Model, node: ir.Node, weight: Weight) -> _Table | None:
    """Look rows up as codes and dequantize those alone; a whole table would be dequantized in each run."""
    codes, blocks = weight.codes(), weight.blocks()
    size = _block_size(blocks.T) if codes.ndim == 2 and attribute(node, "axis", 0) == 0 else None
    if size is None or codes.shape[1] % 2:
        _narrow(model, weight)
        return None
    parts = _parts(model, weight, codes, blocks[:, ::size], table=True)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": size}
    if parts[0].dtype == ir.DataType.UINT8:
        attributes["bits"] = 8
    rows = ir.node(
        "GatherBlockQuantized", [parts[0], node.inputs[1], *parts[1:]], attributes, domain=_CONTRIB
    )
    model.opset_imports[_CONTRIB] = 1
    model.graph.insert_before(node, rows)
    replace(model.graph, node.outputs[0], rows.outputs[0])
    model.graph.remove(node, safe=True)
    return _Table(parts, codes, size)


def _narrow(model: ir.Model, weight: Weight) -> None:
    """Store codes in fewer bits where they stand; they are dequantized in each run."""
    node, codes, zero_point = weight.source.node, weight.source.codes, weight.source.zero_point
    if codes is None or len(node.inputs) < 3:
        return
    dtype = _type(model, codes, zero_point)
    for index, part in ((0, codes), (2, zero_point)):
        name = f"{name_of(node.inputs[index])}.narrow"
        node.replace_input_with(index, initializer(model.graph, name, part.astype(dtype)))


def _by_input(blocks: Array) -> tuple[Array, dict[str, int]] | None:
    """Return the index of each scale of [inputs, outputs], and what DequantizeLinear has to be told."""
    if (blocks == blocks[:1]).all():
        row = blocks[0]
        return (row[0], {}) if (row == row[0]).all() else (row, {"axis": 1})
    size = _block_size(blocks)
    return None if size is None else (blocks[::size], {"axis": 0, "block_size": size})


def _block_size(blocks: Array) -> int | None:
    """Return the largest power of two so many neighbours of the first axis share a scale."""
    size: int = 1 << max(len(blocks) - 1, _LEAST_BLOCK - 1).bit_length()
    changes = np.flatnonzero((blocks[1:] != blocks[:-1]).reshape(len(blocks) - 1, -1).any(1)) + 1
    common = int(np.gcd.reduce(changes, initial=size))  # what divides all of them, a power of two as size is
    return common if common >= _LEAST_BLOCK else None


def _parts(
    model: ir.Model, weight: Weight, codes: Array, index: Array, table: bool = False
) -> list[ir.Value]:
    """Return codes, scales and, where they are not 0, zero points."""
    zero_point = np.broadcast_to(weight.source.zero_point, weight.source.scale.shape).reshape(-1)[index]
    dtype = _type(model, codes, zero_point, least_bits=4 if table else 2)
    if table and dtype == np.int8:
        codes, zero_point = (x.astype(np.int16) + _MIDDLE for x in (codes, zero_point))
        dtype = np.dtype(np.uint8)
    stem = weight.name + (ROWS if table else FACTOR)
    parts = {stem: codes.astype(dtype), f"{stem}.scale": weight.source.scale.reshape(-1)[index]}
    if zero_point.any() or (table and dtype == np.uint8):  # for none there one operation takes 128, another 0
        parts[f"{stem}.zero_point"] = zero_point.astype(dtype)
    return [initializer(model.graph, *part) for part in parts.items()]


def _type(model: ir.Model, codes: Array, zero_point: Array, least_bits: int = 2) -> Any:  # noqa: ANN401  # a numpy dtype
    """Return the narrowest type that holds the codes, of those the file's version of ONNX knows."""
    opset = model.opset_imports.get("", 21)
    low = min(codes.min(initial=0), zero_point.min(initial=0))
    high = max(codes.max(initial=0), zero_point.max(initial=0))
    for dtype, bits, least, since in _TYPES:
        if opset >= since and bits >= least_bits and least <= low and high < least + (1 << bits):
            return np.dtype(dtype)
    return codes.dtype

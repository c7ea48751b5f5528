"""An ONNX file compared with the simulation operation by operation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Task
from qpipe.calls import Call, tensors
from qpipe.proof import Agreement, LayerCalls, StepByStep, forced, forced_layers
from qpipe_onnx._runtime import session

_QUANTIZED = re.compile(r"quantize_per_tensor(?:_(\d+))?")  # named in order of execution by torch.export
_DYNAMIC = re.compile(r"(dynamic_(\d+))\.\w+")
_ADVICE = (
    "leave it in floating point (layers=[…]), or use weight.num_bits=7 on a processor whose int8 products "
    "saturate"
)


def step_by_step(converted: nn.Module, path: Path, call: Call, task: Task) -> dict[str, Any]:
    """Feed the converted model what ONNX Runtime computed, and compare what it makes of that.

    Raises:
        ProofError: an edge is off by more than one step, or a layer or the output is.
    """
    executed = _executed(path, call)
    result = StepByStep("ONNX Runtime", _ADVICE)
    with (
        torch.no_grad(),
        forced(converted, executed.codes, result, executed.dynamic),
        forced_layers(converted, executed.layers, result),
    ):
        simulated = task.compared(converted(*call[0], **call[1]))
    agreement = Agreement.between(_same_shape(executed.outputs, simulated), simulated, task.class_dim)
    result.check(agreement)
    return result.summary()


@dataclass
class _Executed:
    """What ONNX Runtime computed.

    Args:
        codes: of quantizers with stored ranges, by their turn.
        dynamic: what quantizers with dynamic ranges made, by their turn.
        layers: by their weight.
    """

    outputs: list[Tensor]
    codes: dict[int, Tensor]
    dynamic: dict[int, Tensor]
    layers: LayerCalls


def _executed(path: Path, call: Call) -> _Executed:
    import onnx_ir as ir

    from qpipe_onnx import _tables, _weights

    model = ir.load(path)
    outputs, asked = [*model.graph.outputs], dict.fromkeys(model.graph.outputs)
    turns: dict[int, ir.Value] = {}
    layers: list[tuple[str, ir.Value, ir.Value]] = []
    tables = _tables.decoded(model.graph)
    for node in model.graph:
        match = _QUANTIZED.fullmatch(str(node.outputs[0].name))
        if node.op_type in ("QuantizeLinear", "Max", "Min") and match:
            turns[int(match.group(1) or 0)] = node.outputs[0]
        layers += [found] if (found := _weights.layer(node, tables)) is not None else []
        asked |= {v: None for v in node.outputs if _DYNAMIC.fullmatch(str(v.name))}
    asked |= dict.fromkeys([*turns.values(), *(value for _, *ends in layers for value in ends)])
    model.graph.outputs[:] = [value for value in asked if not value.is_graph_input()]
    values = _values(ir.to_proto(model).SerializeToString(), call)
    by_weight: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for weight, before, after in layers:
        by_weight.setdefault(weight, []).append((values[str(before.name)], values[str(after.name)]))
    codes = {turn: values[str(value.name)].int() for turn, value in turns.items()}
    return _Executed([values[str(value.name)] for value in outputs], codes, _dynamic_edges(values), by_weight)


def _dynamic_edges(values: dict[str, Tensor]) -> dict[int, Tensor]:
    from qpipe_onnx._dynamic import CODES, MIDDLE, SCALE, ZERO_POINT

    edges: dict[int, Tensor] = {}
    for name in values:
        match = _DYNAMIC.fullmatch(name)
        if match and name.endswith(CODES):
            codes, scale = values[name].int(), values[match[1] + SCALE]
            zero_point = values.get(match[1] + ZERO_POINT, torch.tensor(MIDDLE)).int()
            edges[int(match[2])] = (codes - zero_point) * scale
    return edges


def _values(file: bytes, call: Call) -> dict[str, Tensor]:
    """Return every input and output of a file by name."""
    runtime = session(file)
    feed = {value.name: x.numpy() for value, x in zip(runtime.get_inputs(), tensors(call), strict=True)}
    names = [value.name for value in runtime.get_outputs()]
    results = dict(zip(names, runtime.run(names, feed), strict=True))
    return {name: torch.from_numpy(x) for name, x in (feed | results).items()}


def _same_shape(outputs: list[Tensor], simulated: Tensor) -> Tensor:
    return next(x for x in outputs if x.shape == simulated.shape and x.is_floating_point())

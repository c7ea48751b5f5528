"""An ONNX file compared with the simulation operation by operation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Task
from qpipe.calls import Call, tensors
from qpipe.proof import Agreement, StepByStep, forced
from qpipe_onnx._runtime import session

_QUANTIZED = re.compile(r"quantize_per_tensor(?:_(\d+))?")  # named in order of execution by torch.export
_ADVICE = (
    "leave it in floating point (layers=[…]), or use weight.num_bits=7 on a processor whose int8 products "
    "saturate"
)


def step_by_step(converted: nn.Module, path: Path, call: Call, task: Task) -> dict[str, Any]:
    """Feed the converted model the codes ONNX Runtime computed, and compare what it makes of them.

    Raises:
        ProofError: an edge is off by more than one step, or the output is.
    """
    output, codes = _executed(path, call)
    result = StepByStep("ONNX Runtime", _ADVICE)
    with torch.no_grad(), forced(converted, codes, result):
        simulated = task.compared(converted(*call[0], **call[1]))
    agreement = Agreement.between(_same_shape(output, simulated), simulated, task.class_dim)
    result.check(agreement)
    return result.summary()


def _executed(path: Path, call: Call) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return the outputs and the codes of every quantizer, by its turn."""
    import onnx

    model = onnx.load(path)
    turns = {
        node.output[0]: int(match.group(1) or 0)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and (match := _QUANTIZED.fullmatch(node.output[0]))
    }
    names = [value.name for value in model.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in turns if name not in names)
    runtime = session(model.SerializeToString())
    feed = {value.name: x.numpy() for value, x in zip(runtime.get_inputs(), tensors(call), strict=True)}
    found = dict(
        zip([*names, *turns], map(torch.from_numpy, runtime.run([*names, *turns], feed)), strict=True)
    )
    return [found[name] for name in names], {turn: found[name].int() for name, turn in turns.items()}


def _same_shape(outputs: list[Tensor], simulated: Tensor) -> Tensor:
    return next(x for x in outputs if x.shape == simulated.shape and x.is_floating_point())

"""An OpenVINO graph compared with the simulation operation by operation."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Task
from qpipe.calls import Call, tensors
from qpipe.proof import Agreement, StepByStep, forced
from qpipe_openvino._runtime import compiled

_QUANTIZED = re.compile(r"quantize_per_tensor(?:_(\d+))?")  # named in order of execution by torch.export
_ADVICE = (
    "leave it in floating point (layers=[…]), or use weight.num_bits=7 on a processor whose int8 products "
    "saturate"
)


def step_by_step(converted: nn.Module, graph: Any, call: Call, task: Task) -> dict[str, Any]:  # noqa: ANN401
    """Feed the converted model the codes OpenVINO computed, and compare what it makes of them.

    Raises:
        ProofError: an edge is off by more than one step, or the output is.
    """
    outputs, codes = _executed(graph.clone(), call)
    result = StepByStep("OpenVINO", _ADVICE)
    with torch.no_grad(), forced(converted, codes, result):
        simulated = task.compared(converted(*call[0], **call[1]))
    executed = next(x for x in outputs if x.shape == simulated.shape and x.is_floating_point())
    result.check(Agreement.between(executed, simulated, task.class_dim))
    return result.summary()


def _executed(graph: Any, call: Call) -> tuple[list[Tensor], dict[int, Tensor]]:  # noqa: ANN401
    """Return the outputs and the codes of every quantizer, by its turn."""
    count = len(graph.outputs)
    turns = {
        int(match.group(1) or 0): output
        for node in graph.get_ordered_ops()
        for output in node.outputs()
        for name in output.get_names()
        if (match := _QUANTIZED.fullmatch(name))
    }
    graph.add_outputs([*turns.values()])
    found = compiled(graph)([x.numpy() for x in tensors(call)])
    results = [torch.from_numpy(found[i].copy()) for i in range(count + len(turns))]
    return results[:count], {turn: x.int() for turn, x in zip(turns, results[count:], strict=True)}

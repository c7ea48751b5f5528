"""Write a CNN as a program of integers, and prove it operation by operation."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpipe import (
    Artifact,
    CodedActivation,
    DataError,
    ExportContext,
    Exporter,
    Recipe,
    RecipeError,
    Role,
    Slot,
    Task,
    convert,
    hookimpl,
)
from qpipe.calls import Call, exported, moved, some_samples, tensors, two_samples
from qpipe.conversion import reason_not_affine
from qpipe.proof import Agreement, StepByStep, calls, end_to_end, forced
from qpipe_methods.integer.interpreter import IntegerModule
from qpipe_methods.integer.lower import lower
from qpipe_methods.integer.program import Program

_FILE = "model.safetensors"
_STEP_SAMPLES = 16  # compared edge by edge
_PROBE = torch.empty(8, 4096, device="meta")


class IntegerExporter(Exporter):
    """Export the quantized graph in integers alone, for processors without floating point.

    Sums are int32, their rescaling is a 32 x 32 bit product and a shift, a bias is in units of s_x s_w, ReLU
    and ReLU6 are the ends of the code range, additions and averages are sums of codes. That no input can make
    a sum leave int32 follows from the weights and is checked. The file is safetensors; its header holds the
    program as JSON.

    Args:
        samples: evaluation samples compared with the simulation.

    Source: Jacob et al., 2017, 1712.05877, section 2; Yao et al. (HAWQ-V3), 2020, 2011.10680, section 3.
    """

    name = "integer"

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples

    def reason_not(self, recipe: Recipe) -> str | None:
        """Name the first thing that has no integer form."""
        if recipe.weight is None or recipe.activation is None:
            return (
                "integer arithmetic needs both weights and activations in codes; leave neither of them null"
            )
        reasons = (_reason(role, slot) for role, slot in recipe.every_slot())
        return next((reason for reason in reasons if reason is not None), None)

    def export(self, context: ExportContext) -> Artifact:
        """Write model.safetensors, run it with the reference interpreter and compare.

        Raises:
            ProofError: an edge is more than one step away from the simulation.
            RecipeError: an operation has no integer form.
        """
        call = next(calls(context), None)
        if call is None:
            raise DataError(
                "there is no evaluation sample to prove the integer program on; give the data some"
            )
        path = context.folder / _FILE
        converted = convert(context.simulation).cpu()
        call = moved(call, "cpu")
        program, quantized = _lowered(converted, call)
        program.write(path)
        module = IntegerModule(Program.read(path))
        with torch.no_grad():
            proof = _step_by_step(
                converted, module, quantized, some_samples(call, _STEP_SAMPLES), context.task
            )
            proof |= end_to_end(module, context, self.samples)
        proof["steps"] = dict(Counter(step.op for step in program.steps).most_common())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        engine = "qpipe's integer interpreter"
        return Artifact(self.name, engine, Path(_FILE), digest, path.stat().st_size, proof, module)

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return a module that interprets the program."""
        return IntegerModule(Program.read(path))


def _lowered(converted: nn.Module, call: Call) -> tuple[Program, list[str]]:
    inputs, example = tensors(call), two_samples(call)
    if len(inputs) != 1:
        raise RecipeError(
            f"an integer program takes one tensor, the model {len(inputs)}; leave out exporter integer"
        )
    edges: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: edges.append(module.name))
        for module in converted.modules()
        if isinstance(module, CodedActivation)
    ]
    with torch.no_grad():
        converted(*example[0], **example[1])
    for hook in hooks:
        hook.remove()
    return lower(exported(converted, call), edges, next(iter(call[1]), None))


def _step_by_step(
    converted: nn.Module, module: IntegerModule, quantized: list[str], call: Call, task: Task
) -> dict[str, Any]:
    """Feed the converted model the codes of the program, and compare what it makes of them."""
    result = StepByStep("the integer program")
    (x,) = tensors(call)
    values = module.values(x)
    codes = {turn: values[name].int() for turn, name in enumerate(quantized)}
    with forced(converted, codes, result):
        simulated = task.compared(converted(*call[0], **call[1]))
    executed = task.compared(module(*call[0], **call[1]))
    result.check(Agreement.between(executed, simulated, task.class_dim))
    return result.summary()


def _reason(role: Role, slot: Slot) -> str | None:
    spec, granularity = slot.spec, slot.granularity
    if reason := reason_not_affine(role, slot):
        return reason
    if spec.dynamic:
        return f"{role.value}.dynamic=true: ranges taken while running are real numbers"
    if spec.num_bits > 8:
        return f"int32 sums hold codes of at most 8 bits, not {role.value}.num_bits={spec.num_bits}"
    rows = 1 if role is Role.ACTIVATION else _PROBE.shape[0]
    if granularity.to_blocks(_PROBE).shape[0] > rows:
        return f"granularity '{granularity.name}' gives {role.value}s more scales than one a channel"
    return None


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the integer exporter."""
    return [IntegerExporter]

"""How closely an executed file agrees with the simulation, in all and operation by operation.

A deep network amplifies rounding ties: two float kernels of torch itself, on EfficientNet-Lite0 in W8A8,
agree to 30 dB only and differ in the arg-max of 3 % of the photos. So a bound on the whole says little, and
every operation is held to one step *given the codes it was given*: the simulation is fed the executed codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpipe import CodedActivation, ProofError, Task
from qpipe_onnx._call import Call, tensors
from qpipe_onnx._runtime import session

_QUANTIZED = re.compile(r"quantize_per_tensor(?:_(\d+))?")  # named in order of execution by torch.export
_MAX_STEPS = 1.0
_MIN_PERCENT = 99.5


@dataclass(frozen=True)
class Agreement:
    """What two outputs for the same samples have in common.

    Args:
        agreement_percent: samples of equal arg-max; None where arg-max means nothing.
        sqnr_db: power of the simulated output over that of the difference.
        max_difference_steps, rms_difference_steps: in steps of 1/255 of the simulated output's range.
    """

    agreement_percent: float | None
    sqnr_db: float
    max_difference_steps: float
    rms_difference_steps: float

    @classmethod
    def between(cls, executed: Tensor, simulated: Tensor, class_dim: int | None) -> Self:
        """Compare two outputs of equal shape."""
        executed, simulated = executed.double(), simulated.double()
        difference = executed - simulated
        step = ((simulated.max() - simulated.min()) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        power = difference.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
        agreement = None
        if class_dim is not None:
            agreement = (
                100 * (executed.argmax(class_dim) == simulated.argmax(class_dim)).double().mean().item()
            )
        return cls(
            agreement,
            10 * torch.log10(simulated.square().mean() / power).item(),
            (difference.abs().max() / step).item(),
            (power.sqrt() / step).item(),
        )


@dataclass
class StepByStep:
    """Differences of each edge, in steps of its own quantizer, given equal inputs."""

    largest: dict[str, int] = field(default_factory=dict)
    unequal: int = 0
    codes: int = 0

    def add(self, name: str, executed: Tensor, simulated: Tensor) -> None:
        """Compare the codes of one edge."""
        difference = (executed - simulated).abs()
        self.largest[name] = max(self.largest.get(name, 0), int(difference.max()))
        self.unequal += int((difference > 0).sum())
        self.codes += difference.numel()

    def check(self, output: Agreement) -> None:
        """Raise ProofError, naming the first edge, where a difference exceeds one step."""
        for name, steps in self.largest.items():
            if steps > _MAX_STEPS:
                raise ProofError(
                    f"ONNX Runtime computes edge '{name}' {steps} steps away from the simulation, 1 is "
                    "allowed; leave it in floating point (layers=[…]), or use weight.num_bits=7 on a "
                    "processor whose int8 products saturate"
                )
        percent = 100.0 if output.agreement_percent is None else output.agreement_percent
        if output.max_difference_steps > _MAX_STEPS or percent < _MIN_PERCENT:
            raise ProofError(
                f"ONNX Runtime's output is {output.max_difference_steps:.2f} steps away from the "
                f"simulation's, {percent:.1f} % of its arg-max agree; 1 step and {_MIN_PERCENT} % are allowed"
            )

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        equal = 100 * (1 - self.unequal / self.codes) if self.codes else 100.0
        return {
            "edges": len(self.largest),
            "largest_edge_difference_steps": max(self.largest.values(), default=0),
            "equal_codes_percent": equal,
        }


def step_by_step(converted: nn.Module, path: Path, call: Call, task: Task) -> dict[str, Any]:
    """Feed the converted model the codes ONNX Runtime computed, and compare what it makes of them.

    Raises:
        ProofError: an edge is off by more than one step, or the output is.
    """
    output, codes = _executed(path, call)
    result = StepByStep()
    with torch.no_grad(), _forced(converted, codes, result):
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


@contextmanager
def _forced(converted: nn.Module, codes: dict[int, Tensor], result: StepByStep) -> Iterator[None]:
    """Let every activation quantizer be compared, and answer with the executed codes."""
    turn = iter(range(10**9))

    def force(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        executed = codes.get(next(turn)) if output.is_floating_point() else None
        if executed is None or not isinstance(module, CodedActivation):
            return output
        executed = executed.reshape(output.shape)  # the file pools [B, C, 1, 1] where the model means [B, C]
        result.add(module.name, executed, torch.round(output / module.scale).int() + module.zero_point)
        return (executed - module.zero_point).to(output.dtype) * module.scale

    handles = [m.register_forward_hook(force) for m in converted.modules() if isinstance(m, CodedActivation)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

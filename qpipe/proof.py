"""How closely an executed file agrees with the simulation, in all and operation by operation.

A deep network amplifies rounding ties: two float kernels of torch itself, on EfficientNet-Lite0 in W8A8,
agree to 30 dB only and differ in the arg-max of 3 % of the photos. So a bound on the whole says little, and
every operation is held to one step *given the codes it was given*: the simulation is fed the executed codes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpipe.calls import Call, batch_size, moved, repeated
from qpipe.conversion import CodedActivation, CodedWeight, DynamicActivation
from qpipe.errors import ProofError
from qpipe.tables import TabledWeight

if TYPE_CHECKING:
    from qpipe.kinds.exporter import ExportContext

_MAX_STEPS = 1.0
_MIN_PERCENT = 99.5
_MAX_RELATIVE = 1e-3
_ROUNDS = 100  # of timing, whose median stands by then
_BATCH_SIZES = {"": 1, "_b32": 32}  # timed, by what their figures are called behind
_PATIENCE_MS = 2000.0  # a batch whose one call is expected to take longer is not timed
LayerCalls = Mapping[str, Sequence[tuple[Tensor, Tensor]]]  # input and output of each call, in order


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
        tally = _Tally(class_dim)
        tally.add(executed, simulated)
        return cls.of(tally)

    @classmethod
    def of(cls, tally: _Tally) -> Self:
        """Return what batches of outputs have in common."""
        step = max((tally.high - tally.low) / 255, torch.finfo(torch.float32).tiny)
        power = max(tally.noise / tally.count, torch.finfo(torch.float64).tiny)
        return cls(
            100 * tally.equal / tally.choices if tally.choices else None,
            10 * math.log10(max(tally.signal / tally.count / power, torch.finfo(torch.float64).tiny)),
            tally.largest / step,
            math.sqrt(power) / step,
        )


@dataclass
class _Tally:
    """Sums over batches of two outputs, so that none has to be kept: a decoder's take gigabytes."""

    class_dim: int | None
    equal: int = 0
    choices: int = 0
    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, executed: Tensor, simulated: Tensor) -> None:
        """Compare two outputs of equal shape."""
        if self.class_dim is not None:
            equal = executed.argmax(self.class_dim) == simulated.argmax(self.class_dim)
            self.equal, self.choices = self.equal + int(equal.sum()), self.choices + equal.numel()
        simulated = simulated.double()
        difference = executed.double() - simulated
        self.count += simulated.numel()
        self.signal += simulated.square().sum().item()
        self.noise += difference.square().sum().item()
        self.largest = max(self.largest, difference.abs().max().item())
        self.low, self.high = min(self.low, simulated.min().item()), max(self.high, simulated.max().item())


@dataclass
class StepByStep:
    """Differences of each edge, in steps of its own quantizer, and of layers whose weight alone is codes.

    Both are given equal inputs; a layer's difference is relative to its largest output.

    Args:
        engine: what executed the file, for messages.
        advice: what a user may do about an edge that differs.
    """

    engine: str
    advice: str = "leave it in floating point (layers=[…])"
    largest: dict[str, int] = field(default_factory=dict)
    unequal: int = 0
    codes: int = 0
    layers: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, executed: Tensor, simulated: Tensor) -> None:
        """Compare the codes of one edge."""
        difference = (executed - simulated).abs()
        self.largest[name] = max(self.largest.get(name, 0), int(difference.max()))
        self.unequal += int((difference > 0).sum())
        self.codes += difference.numel()

    def add_layer(self, name: str, executed: Tensor, simulated: Tensor) -> None:
        """Compare the outputs of one layer."""
        largest = simulated.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        difference = ((executed - simulated).abs().max() / largest).item()
        self.layers[name] = max(self.layers.get(name, 0.0), difference)

    def check(self, output: Agreement) -> None:
        """Raise ProofError, naming the first edge or layer, where a difference exceeds what is allowed."""
        for name, steps in self.largest.items():
            if steps > _MAX_STEPS:
                raise ProofError(
                    f"{self.engine} computes edge '{name}' {steps} steps away from the simulation, 1 is "
                    f"allowed; {self.advice}"
                )
        for name, difference in self.layers.items():
            if not difference <= _MAX_RELATIVE:
                raise ProofError(
                    f"{self.engine} computes layer '{name}' {difference:.2g} of its largest output away from "
                    f"the simulation, {_MAX_RELATIVE} is allowed; {self.advice}"
                )
        percent = 100.0 if output.agreement_percent is None else output.agreement_percent
        if output.max_difference_steps > _MAX_STEPS or percent < _MIN_PERCENT:
            raise ProofError(
                f"{self.engine}'s output is {output.max_difference_steps:.2f} steps away from the "
                f"simulation's, {percent:.1f} % of its arg-max agree; 1 step and {_MIN_PERCENT} % are allowed"
            )

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        equal = 100 * (1 - self.unequal / self.codes) if self.codes else 100.0
        return {
            "edges": len(self.largest),
            "largest_edge_difference_steps": max(self.largest.values(), default=0),
            "equal_codes_percent": equal,
            "layers": len(self.layers),
            "largest_layer_difference": max(self.layers.values(), default=0.0),
        }


@contextmanager
def forced(
    converted: nn.Module,
    codes: Mapping[int, Tensor],
    result: StepByStep,
    dynamic: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Let every activation quantizer be compared, and answer with the executed codes.

    Args:
        codes: of the n-th activation quantizer that is executed, from 0; absent where the engine shows none.
        dynamic: the reals the n-th quantizer with dynamic ranges returned.
    """
    turn, dynamic_turn, rounded = count(), count(), dynamic or {}

    def force(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        executed = codes.get(next(turn)) if output.is_floating_point() else None
        if executed is None or not isinstance(module, CodedActivation):
            return output
        executed = executed.reshape(output.shape)  # the file pools [B, C, 1, 1] where the model means [B, C]
        result.add(module.name, executed, torch.round(output / module.scale).int() + module.zero_point)
        return (executed - module.zero_point).to(output.dtype) * module.scale

    def force_dynamic(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        executed = rounded.get(next(dynamic_turn)) if output.is_floating_point() else None
        if executed is None or not isinstance(module, DynamicActivation):
            return output
        executed, steps = executed.reshape(output.shape), module.steps(args[0])
        result.add(module.name, *(torch.round(x / steps).int() for x in (executed, output)))
        return executed

    hooks = {CodedActivation: force, DynamicActivation: force_dynamic}
    handles = [m.register_forward_hook(hooks[type(m)]) for m in converted.modules() if type(m) in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forced_layers(converted: nn.Module, layers: LayerCalls, result: StepByStep) -> Iterator[None]:
    """Let layers be compared, each given the input that was executed, and answer with what was executed.

    Args:
        layers: by the name, of a tied one any name, of the CodedWeight or TabledWeight the layer reads.
    """
    every = converted.named_modules(remove_duplicate=False)
    executed = {m: iter(layers[name]) for name, m in every if name in layers}
    with ExitStack() as stack:
        for path, module in converted.named_modules():
            stored = [m for m in module.children() if isinstance(m, (CodedWeight, TabledWeight))]
            if len(stored) == 1 and stored[0] in executed:
                for handle in _force_layer(path, module, executed[stored[0]], result):
                    stack.callback(handle.remove)
        yield


def _force_layer(
    name: str, module: nn.Module, executed: Iterator[tuple[Tensor, Tensor]], result: StepByStep
) -> Iterator[RemovableHandle]:
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        x, y = next(executed, (None, None))
        if x is None or y is None or not args or x.numel() != args[0].numel():
            return None  # a border that the file adds inside the convolution, say
        outputs.append(y)
        return (x.reshape(args[0].shape).to(args[0].dtype), *args[1:])

    def behind(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not outputs:
            return output
        y = outputs.pop().reshape(output.shape)
        result.add_layer(name, y, output)
        return y

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(behind)


def calls(context: ExportContext) -> Iterator[Call]:
    """Yield the evaluation batches as calls, on the simulation's device."""
    tensors = (*context.simulation.parameters(), *context.simulation.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    for batch in context.batches:
        yield moved(context.task.inputs(batch), device)


def end_to_end(module: nn.Module, context: ExportContext, samples: int) -> dict[str, Any]:
    """Compare all of a file with all of the simulation, on as many samples."""
    tally, seen = _Tally(context.task.class_dim), 0
    for args, kwargs in calls(context):
        outputs = (model(*args, **kwargs) for model in (module, context.simulation))
        tally.add(*(context.task.compared(output).cpu() for output in outputs))
        seen += batch_size((args, kwargs))
        if seen >= samples:
            break
    return {"samples": seen, **asdict(Agreement.of(tally))}


def latencies(modules: Mapping[str, Callable[..., Any]], call: Call) -> dict[str, Any]:
    """Return the median time of one call of each module for one sample and for 32 of them, milliseconds.

    Args:
        modules: by what stands before 'latency_ms' in the names of their figures.
    """
    figures: dict[str, Any] = {"threads": 1, "batch_sizes": []}
    least = 0.0
    for suffix, size in _BATCH_SIZES.items():
        if size * least <= _PATIENCE_MS:
            times = latencies_ms([*modules.values()], repeated(call, size))
            figures["batch_sizes"].append(size)
            figures |= {f"{word}latency_ms{suffix}": ms for word, ms in zip(modules, times, strict=True)}
            least = min(times)
    return figures


def latencies_ms(modules: Sequence[Callable[..., Any]], call: Call, seconds: float = 0.4) -> list[float]:
    """Return the median time of one call of each module, taken in turns, milliseconds.

    Args:
        seconds: for all of it, where _ROUNDS turns take longer.
    """
    times: list[list[float]] = [[] for _ in modules]
    stop = time.perf_counter() + seconds
    while len(times[-1]) < 3 or (len(times[-1]) < _ROUNDS and time.perf_counter() < stop):
        for module, taken in zip(modules, times, strict=True):
            start = time.perf_counter()
            module(*call[0], **call[1])
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]

"""What each tensor's quantization alone costs, at each width: by output error, KL or Hessian trace."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qpipe import QParams, Slot, Task
from qpipe.nn import FakeQuant, QuantizedWeight, disabled, weight_quantizers
from qpipe.task import Batches
from qpipe_methods.replay import Replay

log = logging.getLogger("qpipe")
FLOAT_BITS = 32  # a width that leaves a layer in floating point
_Compare = Callable[[Tensor, Tensor, Any], tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """A width of one layer: how each of its quantizers then works; in floating point there is none."""

    num_bits: int
    parts: tuple[tuple[FakeQuant, Slot, QParams], ...]

    def put(self) -> None:
        """Quantize so from now on."""
        for fake_quant, slot, qparams in self.parts:
            fake_quant.slot = slot
            fake_quant.set_qparams(qparams)


@dataclass(frozen=True)
class Candidates:
    """The widths one layer may have.

    Args:
        path: of the module, as rules for single layers name it.
        weights: what is quantized; several where a module has several, one of tied ones.
        choices: narrowest first.
    """

    path: str
    weights: tuple[QuantizedWeight, ...]
    choices: tuple[Choice, ...]

    @property
    def numel(self) -> int:
        """How many weights."""
        return sum(weight.blocks_input().numel() for weight in self.weights)

    @property
    def fake_quants(self) -> list[FakeQuant]:
        """What quantizes them."""
        return [weight.fake_quant for weight in self.weights]


def candidates(model: nn.Module, bits: Sequence[int], is_fixed: Callable[[str], bool]) -> list[Candidates]:
    """Return every layer with quantized weights, a choice for each width fitted to its elements.

    Args:
        is_fixed: says of a path that its width stays as it is.
    """
    found = []
    for path, of in by_path(model).items():
        weights: dict[FakeQuant, QuantizedWeight] = {}
        for weight in of:
            weights.setdefault(weight.fake_quant, weight)
        own = {fake_quant.slot.spec.num_bits for fake_quant in weights}
        widths = sorted(own if is_fixed(path) else {*bits})
        choices = tuple(_choice([*weights.values()], width) for width in widths)
        found.append(Candidates(path, tuple(weights.values()), choices))
    return found


def by_path(model: nn.Module) -> dict[str, list[QuantizedWeight]]:
    """Return the quantized weights by the path a rule for single layers names; tied ones with the first."""
    found: dict[str, list[QuantizedWeight]] = {}
    for weight in weight_quantizers(model):  # tied ones share a quantizer, named for the first of them
        found.setdefault(weight.fake_quant.name.rpartition(":")[0], []).append(weight)
    return found


def _choice(weights: Sequence[QuantizedWeight], num_bits: int) -> Choice:
    if num_bits == FLOAT_BITS:
        return Choice(num_bits, ())
    return Choice(num_bits, tuple(_part(weight, num_bits) for weight in weights))


def _part(weight: QuantizedWeight, num_bits: int) -> tuple[FakeQuant, Slot, QParams]:
    fake_quant = weight.fake_quant
    slot = replace(fake_quant.slot, spec=replace(fake_quant.slot.spec, num_bits=num_bits))
    if slot == fake_quant.slot:
        return fake_quant, slot, fake_quant.qparams()
    with kept([fake_quant]):
        fake_quant.slot = slot
        return fake_quant, slot, fake_quant.dynamic_qparams(weight.blocks_input())


@contextmanager
def kept(fake_quants: Sequence[FakeQuant]) -> Iterator[None]:
    """Let tensors be quantized otherwise for a while."""
    before = Choice(0, tuple((f, f.slot, f.qparams()) for f in fake_quants))
    try:
        yield
    finally:
        before.put()


@contextmanager
def alone(model: nn.Module, fake_quants: Sequence[FakeQuant]) -> Iterator[None]:
    """Quantize these tensors and leave every other one in floating point."""
    with disabled(model):
        for fake_quant in fake_quants:
            fake_quant.enabled = True
        yield


class Progress:
    """Say every few seconds how much of a long measurement is done, and about how long the rest takes."""

    def __init__(self, title: str, total: int, seconds: float = 5.0) -> None:
        self.title, self.total, self.seconds = title, total, seconds
        self.done, self.begin = 0, time.perf_counter()
        self.said = self.begin

    def step(self, what: str) -> None:
        """Count one."""
        self.done += 1
        now = time.perf_counter()
        if self.done == self.total or now - self.said > self.seconds:
            self.said = now
            spent = now - self.begin
            left = spent / self.done * (self.total - self.done)
            log.info(
                "%s: %s (%d of %d), %.0f s, about %.0f s left",
                *(self.title, what, self.done, self.total, spent, left),
            )


def noise_share(output: Tensor, reference: Tensor, dim: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return the energies of error and signal; their ratio is 10^(-SQNR/10)."""
    return (output - reference).double().square().sum().item(), reference.double().square().sum().item()


def divergence(output: Tensor, reference: Tensor, dim: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return the summed KL(reference || output) of the classes' probabilities, in nats, and of how many."""
    mine, theirs = (x.double().log_softmax(dim) for x in (output, reference))
    kl = F.kl_div(mine, theirs, reduction="sum", log_target=True)
    return kl.item(), float(reference.numel() // reference.shape[dim])


_OUTPUT = {"sqnr": noise_share, "kl": divergence}
MEASURES = (*_OUTPUT, "hessian")


def measure(
    by: str, found: Sequence[Candidates], model: nn.Module, batches: Batches, task: Task, draws: int = 2
) -> list[list[float]]:
    """Return what each choice of each tensor costs alone, everything else in floating point; 0 is nothing.

    Args:
        by: 'sqnr' (noise energy over signal energy of the output), 'kl' (mean, nats) or 'hessian' (HAWQ-v2's
            Omega: mean trace times ||Q(W) - W||^2). All add up over tensors to first order.
        draws: random vectors a batch and weight, of the Hessian.
    """
    if by == "hessian":
        return omegas(found, model, batches, task, draws)
    return _output_costs(_OUTPUT[by], found, model, batches, task, f"sensitivity {by}")


def _output_costs(
    compare: _Compare,
    found: Sequence[Candidates],
    model: nn.Module,
    batches: Batches,
    task: Task,
    title: str,
) -> list[list[float]]:
    """Sum compare's two figures over batches; a choice costs the first over the second."""
    batches = [*batches]
    sums = [torch.zeros(len(each.choices), 2, dtype=torch.float64) for each in found]
    progress = Progress(title, len(batches) * sum(map(len, sums)))
    for batch in batches:
        with disabled(model):
            replay = Replay(model, task.inputs(on_device(batch, model)))
        reference = task.compared(replay.output)
        for each, totals in zip(found, sums, strict=True):
            with kept(each.fake_quants):
                for choice, total in zip(each.choices, totals, strict=True):
                    if choice.parts:  # floating point costs nothing
                        choice.put()
                        with alone(model, each.fake_quants):
                            output = task.compared(replay.run(each.fake_quants))
                        total += torch.tensor(compare(output, reference, task.class_dim), dtype=total.dtype)
                    progress.step(f"{each.path} at {choice.num_bits} bits")
    return [_quotients(over_processes(totals)) for totals in sums]


def _quotients(totals: Tensor) -> list[float]:
    quotients: list[float] = (totals[:, 0].clamp(min=0) / totals[:, 1]).nan_to_num(0).tolist()
    return quotients


def over_processes(sums: Tensor) -> Tensor:
    """Add up what every process saw, so that all of them go on alike."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums


def on_device(batch: Any, model: nn.Module) -> Any:  # noqa: ANN401
    """Return a batch where the model is."""
    device = next(model.parameters()).device
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)


def omegas(
    found: Sequence[Candidates], model: nn.Module, batches: Batches, task: Task, draws: int = 2
) -> list[list[float]]:
    """Return the mean trace of the Hessian times ||Q(W) - W||^2, for each choice of each layer.

    For a loss of Hessian c I this is exactly twice what rounding adds to it.

    Source: Dong et al., 2019, arXiv 1911.03852, equation 8.
    """
    weights = [weight for each in found for weight in each.weights]
    traces = dict(zip(weights, mean_traces(weights, model, batches, task, draws), strict=True))
    costs = []
    for each in found:
        with kept(each.fake_quants):
            costs.append([_omega(each.weights, traces, choice) for choice in each.choices])
    return costs


def _omega(
    weights: Sequence[QuantizedWeight], traces: Mapping[QuantizedWeight, float], choice: Choice
) -> float:
    if not choice.parts:
        return 0.0
    choice.put()
    return sum((traces[weight] * _squared_error(weight) for weight in weights), 0.0)


def _squared_error(weight: QuantizedWeight) -> float:
    x = weight.blocks_input()
    return float((weight.fake_quant(x) - x).double().square().sum())


def mean_traces(
    weights: Sequence[QuantizedWeight],
    model: nn.Module,
    batches: Batches,
    task: Task,
    draws: int = 2,
    seed: int = 0,
) -> list[float]:
    """Return trace(H) / n of each weight, by Hutchinson's estimate with Rademacher vectors.

    H is the Hessian of the output's distance to the float model's: of KL where the output has classes, of
    half the squared error, summed over a sample's outputs, elsewhere; the mean over samples. No labels. At
    the float weights it is the Gauss-Newton matrix. Each weight has vectors of its own (one for all weights
    is as unbiased, but the terms between layers drown small traces); exact in one draw where H is diagonal.

    Source: Dong et al., 2019, arXiv 1911.03852, equations 6 and 7.
    """
    batches = [*batches]
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("sensitivity hessian", len(batches) * len(weights))
    sums = torch.zeros(len(weights) + 1, dtype=torch.float64)  # the last one counts samples
    with _differentiable(weights, model) as parameters:
        for batch in batches:
            args, kwargs = task.inputs(on_device(batch, model))
            output = task.compared(model(*args, **kwargs))
            sums[-1] += len(output)
            distance = _distance(output, task.class_dim)
            gradients = torch.autograd.grad(distance, parameters, create_graph=True)
            for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                for _ in range(draws):
                    sums[i] += _curvature(gradient, parameter, generator) / draws
                progress.step(weights[i].name)
    *totals, samples = over_processes(sums).tolist()
    return [max(total, 0.0) / samples / p.numel() for total, p in zip(totals, parameters, strict=True)]


def _curvature(gradient: Tensor, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return v'Hv for random signs v."""
    v = (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1).to(parameter)
    (product,) = torch.autograd.grad(gradient, parameter, v, retain_graph=True)
    return (v * product).sum(dtype=torch.float64).detach().cpu()


def _distance(output: Tensor, dim: int | None) -> Tensor:
    reference = output.detach()
    if dim is None:
        return (output - reference).square().sum() / 2
    theirs = reference.log_softmax(dim)
    return F.kl_div(output.log_softmax(dim), theirs, reduction="sum", log_target=True)


@contextmanager
def _differentiable(weights: Sequence[QuantizedWeight], model: nn.Module) -> Iterator[list[Tensor]]:
    """Lend the weights as the only parameters that want a gradient, with kernels that have a second one."""
    parameters: list[Tensor] = [w.parameter for w in weights if w.parameter is not None]
    wanted = {p: p.requires_grad for p in model.parameters()}
    with disabled(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        try:
            for parameter in wanted:
                parameter.requires_grad_(any(parameter is p for p in parameters))
            yield parameters
        finally:
            for parameter, before in wanted.items():
                parameter.requires_grad_(before)


def in_words(by: str, cost: float) -> str:
    """Say a cost with its unit."""
    if by == "sqnr":
        return f"{-10 * math.log10(cost):.1f} dB" if cost > 0 else "no error"
    return f"{cost:.3g}" + (" nats" if by == "kl" else "")

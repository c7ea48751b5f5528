"""Widths for a budget: what they cost, and the exact front of cost and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qpipe import QParams, Recipe, Slot, payload_bytes
from qpipe.calls import Call
from qpipe.nn import QuantizedWeight, disabled, edge_quantizers
from qpipe.packing import packed_bytes
from qpipe_methods.latency import microseconds
from qpipe_methods.sensitivity import FLOAT_BITS, Candidates, Choice

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Ledger:
    """What a budget counts.

    Args:
        unit: 'bytes'.
        costs: of each choice of each layer, whole numbers.
        fixed: what is spent whatever is chosen.
        whole: what the float model spends, or how many weights there are.
        per_weight: a budget is a multiple of whole; otherwise only one of at most 1 is, a share.
        unit_of_budget: so many units make one of a budget that is no share.
    """

    unit: str
    costs: list[list[int]]
    fixed: int
    whole: int
    per_weight: bool = False
    unit_of_budget: int = 1

    def limit(self, budget: float) -> int:
        """Return what the choices may cost together; negative where the rest is too much already."""
        scale = self.whole if self.per_weight or budget <= 1 else self.unit_of_budget
        return int(budget * scale) - self.fixed

    def in_words(self, cost: int) -> str:
        """Say what is spent in all when the choices cost so much."""
        share = (cost + self.fixed) / self.whole
        if self.per_weight:
            return f"{share:.4g} {self.unit} a weight"
        return f"{cost + self.fixed:,} {self.unit} ({share:.4g} of fp32)"


@dataclass(frozen=True)
class Setting:
    """What costs are counted in: a prepared, calibrated model, its float reference and a call of it."""

    model: nn.Module
    reference: nn.Module
    call: Call
    recipe: Recipe


def sizes(found: Sequence[Candidates], run: Setting) -> Ledger:
    """Count bytes: codes packed to their bits, their parameters, and what stays in floating point."""
    costs = [[_bytes(each, choice) for choice in each.choices] for each in found]
    now = sum(
        _stored(weight, weight.fake_quant.slot, weight.fake_quant.qparams())
        for e in found
        for weight in e.weights
    )
    return Ledger("bytes", costs, payload_bytes(run.model) - now, payload_bytes(run.reference))


def _bytes(each: Candidates, choice: Choice) -> int:
    if not choice.parts:
        return sum(weight.blocks_input().nbytes for weight in each.weights)
    parts = zip(each.weights, choice.parts, strict=True)
    return sum(_stored(weight, slot, qparams) for weight, (_, slot, qparams) in parts)


def _stored(weight: QuantizedWeight, slot: Slot, qparams: QParams) -> int:
    zero_point = 0 if slot.spec.symmetric else qparams.zero_point.nbytes  # 0s are not stored
    codes = packed_bytes(_num_codes(weight, slot), slot.quantizer.code_bits(slot.spec))
    return codes + qparams.scale.nbytes + zero_point + sum(x.nbytes for x in qparams.extra.values())


def _num_codes(weight: QuantizedWeight, slot: Slot) -> int:
    blocks = slot.granularity.to_blocks(weight.blocks_input())
    return len(blocks) * slot.quantizer.num_codes(blocks.shape[1])


def bits(found: Sequence[Candidates], run: Setting) -> Ledger:
    """Count bits of codes."""
    costs = [[_code_bits(each, choice) for choice in each.choices] for each in found]
    return Ledger("bits", costs, 0, sum(each.numel for each in found), per_weight=True)


def _code_bits(each: Candidates, choice: Choice) -> int:
    if not choice.parts:
        return each.numel * FLOAT_BITS
    parts = zip(each.weights, choice.parts, strict=True)
    return sum(
        _num_codes(weight, slot) * slot.quantizer.code_bits(slot.spec) for weight, (_, slot, _) in parts
    )


def bops(found: Sequence[Candidates], run: Setting) -> Ledger:
    """Count bit operations of linear and convolutional layers: MACs x weight bits x bits of their input."""
    macs = multiplications(found, run.model, run.call)
    inputs = {
        path: e.slot.spec.num_bits for e in edge_quantizers(run.model) if e.edge for path in e.edge.consumers
    }
    costs = [
        [macs[each.path] * choice.num_bits * inputs.get(each.path, FLOAT_BITS) for choice in each.choices]
        for each in found
    ]
    return Ledger("bit operations", costs, 0, sum(macs.values()) * FLOAT_BITS**2)


def multiplications(found: Sequence[Candidates], model: nn.Module, call: Any) -> dict[str, int]:  # noqa: ANN401
    """Return multiply-accumulate operations of one sample by path of the layer; 0 for other kinds.

    A linear or convolutional layer multiplies its whole weight [O, *] once for each output position.
    """
    macs = {each.path: 0 for each in found}

    def count(path: str, weight: Tensor, module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ANN401
        x, channels = (
            (args[0], weight.shape[0]) if isinstance(module, _TRANSPOSED) else (output, weight.shape[0])
        )
        macs[path] += weight.numel() * (x.numel() // channels) // samples

    args, kwargs = call
    samples = next(
        x.shape[0] for x in torch.utils._pytree.tree_leaves(call) if isinstance(x, Tensor) and x.dim()
    )
    with ExitStack() as stack, disabled(model), torch.no_grad():
        for each in found:
            module, weight = each.weights[0].module, each.weights[0].parameter
            if isinstance(module, _LAYERS) and weight is not None:
                hook = partial(count, each.path, weight)
                stack.callback(module.register_forward_hook(hook).remove)
        model(*args, **kwargs)
    return macs


def latency(found: Sequence[Candidates], run: Setting) -> Ledger:
    """Count microseconds of one sample in the file of the first exporter that measures them."""
    costs, rest, whole = microseconds(found, run.model, run.call, run.recipe)
    return Ledger("µs", costs, rest, whole, unit_of_budget=1000)


LEDGERS: Mapping[str, Callable[[Sequence[Candidates], Setting], Ledger]] = {
    "size": sizes,
    "average_bits": bits,
    "bops": bops,
    "latency": latency,
}


@dataclass(frozen=True)
class Front:
    """Every sum of costs at which no cheaper choice loses as little, cheapest first.

    Args:
        costs: [n], rising.
        losses: [n], falling.
        picks: [layers, n], which choice of each layer makes up a point.
    """

    costs: Any  # numpy.ndarray of int64
    losses: Any  # numpy.ndarray of float64
    picks: Any  # numpy.ndarray of int64

    def best(self, limit: int) -> int | None:
        """Return the point of least loss whose cost is within limit; None if there is none."""
        within = int(np.searchsorted(self.costs, limit, side="right"))
        return within - 1 if within else None


def front(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> Front:
    """Return the whole Pareto front of choosing one of each layer's choices; both sums are to be small.

    Exact: costs are integers, and a partial sum is dropped only where another costs no more and loses no more
    (Nemhauser and Ullmann, 1969).
    """
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for own_costs, own_losses in zip(costs, losses, strict=True):
        all_costs = (cost[:, None] + np.asarray(own_costs, np.int64)).ravel()
        all_losses = (loss[:, None] + np.asarray(own_losses, np.float64)).ravel()
        order = np.lexsort((all_losses, all_costs))
        falling = np.minimum.accumulate(all_losses[order])
        kept = order[np.concatenate([[True], all_losses[order][1:] < falling[:-1]])]
        cost, loss = all_costs[kept], all_losses[kept]
        steps.append(np.divmod(kept, len(own_costs)))
    picks = np.empty((len(steps), len(cost)), np.int64)
    at = np.arange(len(cost))
    for row, (before, pick) in zip(picks[::-1], reversed(steps), strict=True):
        row[:] = pick[at]
        at = before[at]
    return Front(cost, loss, picks)

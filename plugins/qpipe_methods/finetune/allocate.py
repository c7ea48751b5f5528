"""Give each layer its own bits: the least loss a budget allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from qpipe import FinetuneStrategy, Recipe, RecipeError, Role, calibration_batches, hookimpl
from qpipe.nn import remove_weight_quantizer
from qpipe.recipe import SlotEdit
from qpipe_methods.allocation import LEDGERS, Front, Ledger, Setting, front
from qpipe_methods.latency import timing
from qpipe_methods.sensitivity import (
    FLOAT_BITS,
    MEASURES,
    Candidates,
    by_path,
    candidates,
    in_words,
    measure,
    on_device,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Reference, Task

log = logging.getLogger("qpipe")
_STORED = 64  # points of the front that a report keeps


class Allocate(FinetuneStrategy):
    """Choose the bits of each layer's weights, by what quantizing it alone costs and by what it spends.

    Losses of layers are taken to add up. The choice is exact: no other within the budget loses less. Widths
    that rules for single layers give stay as they are. Comes before every other strategy.

    Args:
        budget: one of size (bytes; at most 1: share of the float model's), average_bits (a weight), bops
            (MACs x weight bits x input bits; at most 1: share of 32 x 32 bits) and latency (milliseconds of a
            sample in the exported file, measured; at most 1: share of the float model's).
        sensitivity: sqnr (noise over signal of the output), kl (of its classes) or hessian (HAWQ-v2).
        bits: widths a layer may have; 32 leaves it in floating point, where weights alone are quantized.
        num_samples: of the calibration set.
        draws: random vectors a batch and weight, for sensitivity=hessian.

    Source: Dong et al., "HAWQ-V2", 2019, arXiv 1911.03852; Cai et al., "ZeroQ", 2020, arXiv 2001.00281 (KL,
    Pareto front).
    Equation: min sum_i loss_i(b_i) subject to sum_i cost_i(b_i) <= budget; loss_i(b) = KL, noise share, or
    tr(H_i) / n_i ||Q_b(W_i) - W_i||^2
    """

    name = "allocate"

    def __init__(
        self,
        budget: Mapping[str, float | None],
        sensitivity: str = "sqnr",
        bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
        num_samples: int = 32,
        draws: int = 2,
    ) -> None:
        given = {key: value for key, value in budget.items() if value is not None}
        if unknown := [key for key in budget if key not in LEDGERS]:
            raise ValueError(f"a budget is one of {', '.join(LEDGERS)}, not {unknown[0]}")
        if len(given) != 1:
            raise ValueError(
                "give one budget: budget.size=0.2, budget.average_bits=4, budget.bops=0.02 or "
                "budget.latency=0.8"
            )
        (self.kind, self.budget), *_ = given.items()
        if type(self.budget) not in (int, float) or self.budget <= 0:
            raise ValueError(f"budget.{self.kind}={self.budget} is no number above 0")
        if sensitivity not in MEASURES:
            raise ValueError(f"sensitivity is {' or '.join(MEASURES)}, not {sensitivity!r}")
        if not bits or any(type(width) is not int or width < 1 for width in bits):
            raise ValueError(f"bits are whole numbers, [4,8]; not {bits}")
        if min(bits) >= FLOAT_BITS:
            raise ValueError(f"bits={[*bits]} leave nothing to quantize; add one below {FLOAT_BITS}")
        self.sensitivity = sensitivity
        self.bits = tuple(bits)
        self.num_samples = num_samples
        self.draws = draws

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError where this comes late, no weight is quantized, or an output has no classes."""
        if recipe.finetune[0] is not self:
            raise RecipeError(
                "bits are chosen before anything is tuned to them: put allocate first in finetune"
            )
        if recipe.weight is None:
            raise RecipeError(
                "weight=null leaves no bits to choose; leave out bits=auto, or quantize weights"
            )
        if FLOAT_BITS in self.bits and recipe.activation is not None:
            raise RecipeError(
                f"bits of {FLOAT_BITS} leave layers in floating point, and engines compute them so where "
                "weights alone are quantized; add activation=null, or take it out of finetune.allocate.bits"
            )
        if self.kind == "latency" and timing(recipe) is None:
            raise RecipeError(
                "budget.latency is measured in a file, and none of the exporters "
                f"({', '.join(e.name for e in recipe.exporters) or 'there is none'}) times its operations; "
                "add onnx, exporter=[safetensors,onnx]"
            )
        if self.sensitivity == "kl" and task.class_dim is None:
            raise RecipeError("sensitivity=kl compares classes, and task.class_dim=null has none; use sqnr")

    def edits(self, recipe: Recipe) -> Iterator[tuple[Role, SlotEdit]]:
        """Yield a change to each width."""
        for width in self.bits:
            is_float = width == FLOAT_BITS
            yield Role.WEIGHT, SlotEdit(off=True) if is_float else SlotEdit(spec={"num_bits": width})

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> Mapping[str, Any]:
        """Measure, choose, and quantize by the choice.

        Raises:
            RecipeError: the budget is less than the cheapest widths take.
        """
        batches = calibration_batches(data, self.num_samples)
        found = candidates(model, self.bits, lambda path: _is_fixed(path, recipe))
        call = task.inputs(on_device(next(iter(batches)), model))
        ledger = LEDGERS[self.kind](found, Setting(model, reference.model, call, recipe))
        limit = ledger.limit(self.budget)
        least = sum(map(min, ledger.costs))
        if least > limit:
            raise RecipeError(
                f"budget.{self.kind}={self.budget} ({limit + ledger.fixed:,} {ledger.unit}) is out of reach: "
                f"the cheapest widths take {ledger.in_words(least)}; raise it, or allow other bits"
            )
        losses = measure(self.sensitivity, found, model, batches, task, self.draws)
        points = front(ledger.costs, losses)
        best = points.best(limit)
        picks = points.picks[:, best].tolist()
        chosen = [(each.path, each.choices[pick]) for each, pick in zip(found, picks, strict=True)]
        for _, choice in chosen:
            choice.put()
        tables = self._tables(found, ledger, losses, points, picks, recipe)
        _leave_float(model, [path for path, choice in chosen if not choice.parts])
        return tables

    def _tables(
        self,
        found: Sequence[Candidates],
        ledger: Ledger,
        losses: list[list[float]],
        points: Front,
        picks: list[int],
        recipe: Recipe,
    ) -> dict[str, Any]:
        cost = sum(costs[pick] for costs, pick in zip(ledger.costs, picks, strict=True))
        loss = sum(own[pick] for own, pick in zip(losses, picks, strict=True))
        said = (
            f"allocation: {ledger.in_words(cost)} of budget.{self.kind}={self.budget:g}, expected "
            f"{self.sensitivity} {in_words(self.sensitivity, loss)} by weights alone"
        )
        if all(len(set(costs)) == 1 for costs in ledger.costs):
            said += f"; every width takes as many {ledger.unit}, so the losses alone decided"
        rows = zip(found, ledger.costs, losses, picks, strict=True)
        return {
            "simulated.allocate": {
                "title": "Bits of each layer",
                "about": f"Sensitivity: {self.sensitivity} of the output with one layer quantized alone. "
                f"Up to {_STORED} of the front's {len(points.costs):,} points, bits in the layers' order.",
                "finding": said,
                "layers": [self._row(*row, ledger.unit) for row in rows],
                "rules": f"the same bits again: {as_rules(found, picks, recipe)}",
                "front": [*_points(found, ledger, points)],
                "print": ["layers", "finding", "rules"],
            }
        }

    def _row(
        self, each: Candidates, costs: list[int], losses: list[float], pick: int, unit: str
    ) -> dict[str, Any]:
        """Return a layer's line: what it got, and what its neighbours would have meant."""
        why = [
            f"{in_words(self.sensitivity, losses[i])} at {each.choices[i].num_bits} bits"
            f" for {abs(costs[i] - costs[pick]):,} {unit} {'more' if costs[i] > costs[pick] else 'less'}"
            for i in (pick - 1, pick + 1)
            if 0 <= i < len(costs)
        ]
        return {
            "layer": each.path,
            "bits": each.choices[pick].num_bits,
            "weights": each.numel,
            self.sensitivity: in_words(self.sensitivity, losses[pick]),
            "because": "; ".join(why) or "a rule fixes it",
        }


def _leave_float(model: nn.Module, paths: Sequence[str]) -> None:
    """Take the quantizers of these layers' weights out, so that they are stored as they are."""
    every = by_path(model)
    for weight in (weight for path in paths for weight in every[path]):
        remove_weight_quantizer(weight.module, weight.parameter_name)


def _is_fixed(path: str, recipe: Recipe) -> bool:
    """Whether a rule for single layers gives the width."""
    edits = [rule.edits.get(Role.WEIGHT) for rule in recipe.layers if fnmatchcase(path, rule.match)]
    return any("num_bits" in edit.spec for edit in edits if edit is not None)


def as_rules(found: Sequence[Candidates], picks: Sequence[int], recipe: Recipe) -> str:
    """Return the word of the command line that gives the same widths; behind one's own rules, if any."""
    chosen = [(each.path, each.choices[pick].num_bits) for each, pick in zip(found, picks, strict=True)]
    rules = [
        f"{{match:'{path}',weight:{'null' if width == FLOAT_BITS else f'{{num_bits:{width}}}'}}}"
        for path, width in chosen
        if (slot := recipe.slot(path, Role.WEIGHT)) is None or slot.spec.num_bits != width
    ]
    own = "your own rules," if recipe.layers else ""
    return f'layers="[{own}{",".join(rules)}]"'


def _points(found: Sequence[Candidates], ledger: Ledger, points: Front) -> Iterator[dict[str, Any]]:
    """Yield some of the front's points, both ends among them."""
    for i in np.unique(np.linspace(0, len(points.costs) - 1, _STORED).round().astype(int)):
        picks = points.picks[:, i].tolist()
        yield {
            ledger.unit: int(points.costs[i]) + ledger.fixed,
            "loss": float(points.losses[i]),
            "bits": " ".join(str(e.choices[pick].num_bits) for e, pick in zip(found, picks, strict=True)),
        }


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer the allocation of bits."""
    return [Allocate]

"""Give up the quantization that hurts most, until the gate holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpipe import (
    FinetuneStrategy,
    Recipe,
    RecipeError,
    ReferenceOutputs,
    Role,
    calibration_batches,
    evaluation_batches,
    hookimpl,
    score,
)
from qpipe.nn import FakeQuant, QuantizedWeight, edge_quantizers, remove_weight_quantizer
from qpipe.recipe import SlotEdit
from qpipe.sharing import shared
from qpipe_methods.reconstruction import float_parameter
from qpipe_methods.replay import Replay
from qpipe_methods.sensitivity import FLOAT_BITS, Progress, by_path, on_device, over_processes

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Reference, Task


@dataclass(frozen=True)
class Part:
    """What can be given up at once: the weights of a layer, or an edge.

    Args:
        name: the layer's path, or the edge's name.
        weights: none of an edge.
    """

    name: str
    fake_quants: tuple[FakeQuant, ...]
    weights: tuple[QuantizedWeight, ...] = ()

    @property
    def num_bits(self) -> int:
        """The widest of its quantizers."""
        return max(fake_quant.slot.spec.num_bits for fake_quant in self.fake_quants)

    def give_up(self, model: nn.Module, width: int) -> None:
        """Go on from the float weights, quantized to width; beyond what any quantizer has, not at all."""
        for weight in self.weights:
            _restore(model, weight)
            if width < FLOAT_BITS:
                slot = weight.fake_quant.slot
                weight.fake_quant.slot = replace(slot, spec=replace(slot.spec, num_bits=width))
                weight.fake_quant.set_qparams(weight.fake_quant.dynamic_qparams(weight.blocks_input()))
        if width == FLOAT_BITS:
            for fake_quant in self.fake_quants:
                fake_quant.enabled = False


def _restore(model: nn.Module, weight: QuantizedWeight) -> None:
    """Put back a weight and its layer's bias as they were before any strategy changed them."""
    for name in (weight.parameter_name, "bias"):
        now = weight.module._parameters.get(name)
        if now is not None:
            now.detach().copy_(float_parameter(model, weight.module, name))


class State:
    """What parts are before any is given up; goes from one try to the next."""

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self.model = model
        self.bits = {part: part.num_bits for part in parts}
        self.slots = [(f, f.slot, f.qparams(), f.enabled) for part in parts for f in part.fake_quants]
        modules = [weight.module for part in parts for weight in part.weights]
        tensors = [p for module in modules for p in module._parameters.values() if p is not None]
        self.tensors = [(p, shared(p)) for p in tensors]

    @torch.no_grad()
    def after(self, steps: Sequence[tuple[Part, int]]) -> None:
        """Give up so much, and nothing else."""
        for fake_quant, slot, qparams, enabled in self.slots:
            fake_quant.slot, fake_quant.enabled = slot, enabled
            if qparams.scale.numel():
                fake_quant.set_qparams(qparams)
        for now, before in self.tensors:
            now.detach().copy_(before)
        for part, width in steps:
            part.give_up(self.model, width)


def quantized_parts(model: nn.Module) -> list[Part]:
    """Return the layers with quantized weights, and the edges."""
    layers = [
        Part(path, tuple({w.fake_quant: None for w in of}), tuple(of)) for path, of in by_path(model).items()
    ]
    return [*layers, *(Part(edge.name, (edge,)) for edge in edge_quantizers(model) if edge.enabled)]


@torch.no_grad()
def ranking(
    parts: Sequence[Part], model: nn.Module, reference: Reference, batches: Sequence[Any], task: Task
) -> dict[Part, float]:
    """Return the share of the output's squared error that goes away when a part alone is given up."""
    state = State(model, parts)
    left = torch.zeros(len(parts) + 1, dtype=torch.float64)  # the last one: nothing given up
    progress = Progress("revert: ranking", len(batches) * len(parts))
    for batch in batches:
        args, kwargs = task.inputs(on_device(batch, model))
        expected = task.compared(reference.model(*args, **kwargs)).double()
        replay = Replay(model, (args, kwargs))
        left[-1] += (task.compared(replay.output) - expected).square().sum().cpu()
        for i, part in enumerate(parts):
            state.after([(part, FLOAT_BITS)])
            left[i] += (task.compared(replay.run(part.fake_quants)) - expected).square().sum().cpu()
            progress.step(part.name)
        state.after([])
    shares = 1 - over_processes(left) / left[-1]
    return dict(zip(parts, shares.tolist(), strict=False))


def fewest(count: int, holds: Callable[[int], bool]) -> int | None:
    """Return for how many steps it holds when one less does not, by halving; None if not for all."""
    if not holds(count):
        return None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Revert(FinetuneStrategy):
    """Raise the bits of the worst layers, then leave the worst in floating point, until the gate holds.

    Layers and edges are ranked by how much error of the output goes away when one of them alone goes back to
    its float values, everything else staying quantized. As few as needed are given up, the worst first; the
    number is found by halving, each try measured on the evaluation set, which thereby takes part in choosing.
    Comes after every other strategy.

    Args:
        bits: widths that weights are raised to before anything is left in floating point, rising.
        num_samples: of the calibration set, for the ranking.
    """

    name = "revert"

    def __init__(self, bits: Sequence[int] = (8,), num_samples: int = 32) -> None:
        if list(bits) != sorted({*bits}) or any(type(b) is not int or not 0 < b < FLOAT_BITS for b in bits):
            raise ValueError(f"bits are rising widths, [6,8]; not {list(bits)}")
        self.bits = tuple(bits)
        self.num_samples = num_samples

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError where no gate says when to stop, or something comes after this."""
        if recipe.gate.is_open:
            raise RecipeError("finetune=[revert] goes on until a gate holds; give one: gate.max_drop=1")
        if recipe.finetune[-1] is not self:
            raise RecipeError(
                "layers are given up after everything else was tried: put revert last in finetune"
            )
        late = [name for evaluator in recipe.evaluators for name in evaluator.measured]
        if recipe.gate.metric in late:
            raise RecipeError(
                f"gate.metric={recipe.gate.metric} is no figure of the outputs, which revert could improve"
            )

    def edits(self, recipe: Recipe) -> Iterator[tuple[Role, SlotEdit]]:
        """Yield a change of weights to each width."""
        for width in self.bits:
            yield Role.WEIGHT, SlotEdit(spec={"num_bits": width})

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> Mapping[str, Any]:
        """Give up as little as the gate needs; nothing where even everything would not help."""
        batches, outputs = evaluation_batches(data), ReferenceOutputs(reference.model, task)

        def figures(variant: str, of: nn.Module) -> dict[str, float]:
            return score(variant, of, reference, outputs, batches, task, recipe, trainer)

        fp32 = figures("fp32", reference.model)

        def missed() -> str | None:
            return recipe.gate.miss(fp32, figures("simulated", model))

        if (before := missed()) is None:
            return _told("the gate holds as it is; nothing was given up")
        parts = quantized_parts(model)
        gains = ranking(parts, model, reference, [*calibration_batches(data, self.num_samples)], task)
        steps, state = self.steps(gains), State(model, parts)

        def holds(count: int) -> bool:
            state.after(steps[:count])
            return missed() is None

        count = fewest(len(steps), holds)
        state.after(steps[: count or 0])
        if count is None:
            return _told(f"{before}; floating point throughout does not meet it either")
        taken = dict(steps[:count])
        _leave_float([part for part, width in taken.items() if width == FLOAT_BITS])
        rows = [_row(part, state.bits[part], width, gains[part]) for part, width in taken.items()]
        return _told(f"{len(taken)} of {len(parts)} given up, then the gate held; before, {before}", rows)

    def steps(self, gains: Mapping[Part, float]) -> list[tuple[Part, int]]:
        """Return what is given up, in this order: the width each part goes to."""
        worst = sorted(gains, key=lambda part: -gains[part])
        return [
            (part, width)
            for width in (*self.bits, FLOAT_BITS)
            for part in worst
            if part.num_bits < width and (part.weights or width == FLOAT_BITS)
        ]


def _leave_float(parts: Sequence[Part]) -> None:
    """Take the quantizers of weights out, so that they are stored as they are."""
    for weight in (weight for part in parts for weight in part.weights):
        remove_weight_quantizer(weight.module, weight.parameter_name)


def _told(said: str, rows: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    about = "What was given up for the gate, the worst first, judged on the evaluation set."
    table = {"title": "Reverted", "about": about, "finding": f"revert: {said}", "print": ["rows", "finding"]}
    return {"simulated.revert": {**table, "rows": [*rows]}}


def _row(part: Part, was: int, width: int, gain: float) -> dict[str, Any]:
    return {
        "given up": part.name,
        "of": "weights" if part.weights else "activations",
        "was": f"{was} bits",
        "is": "floating point" if width == FLOAT_BITS else f"{width} bits",
        "error that goes with it": f"{100 * gain:.1f} %",
    }


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer accuracy control."""
    return [Revert]

"""Learn offsets and ranges of the rounding by signed gradient descent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpipe import FinetuneStrategy, QParams, QuantSpec, Range, hookimpl
from qpipe.functional import affine_qparams, round_ste, straight_through
from qpipe.nn import QuantizedWeight
from qpipe.recipe import Slot
from qpipe_methods.finetune._layerwise import LayerwiseStrategy, check_even
from qpipe_methods.finetune.brecq import LearnedRounding, batch_error, find_units, keep_if_better, learning
from qpipe_methods.quadratic import Goal, Levels, fall_back, goal_of, keep
from qpipe_methods.reconstruction import Layer, Unit, walk

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task


class AutoRound(LayerwiseStrategy):
    """Learn what is added to each weight before it is rounded, and how far each range shrinks.

    A layer's error is taken over all samples, from second moments, and its best step is kept; a block's over
    one batch a step, each once before one comes again, and its last step is kept where it errs less than
    rounding to nearest on all samples.

    Args:
        unit: 'layer'; 'block', as published: the outermost modules whose class occurs more than once, other
            layers each on their own, by the error of what they give to the float model's.
        iterations: steps a unit; the step falls linearly from lr.
        lr: of signed gradient descent; None: 1 / iterations.
        ranges: learn the ranges too; False: only the offsets.
        match, ridge: as for GPTQ, of a layer.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Cheng et al., 2023, arXiv 2309.05516, eqs. 3 to 5.
    Equation: W = s clip(round(W / s + V)); V <- V - lr sign(∂L / ∂V)
    """

    name = "autoround"

    def __init__(
        self,
        unit: str = "layer",
        iterations: int = 200,
        lr: float | None = None,
        ranges: bool = True,
        match: str = "layer",
        ridge: float = 0.1,
        num_samples: int = 128,
        memory_gb: float = 4.0,
    ) -> None:
        super().__init__(num_samples, memory_gb)
        if match not in ("layer", "float"):
            raise ValueError(f"match is layer or float, not {match!r}")
        if unit not in ("layer", "block"):
            raise ValueError(f"unit is layer or block, not {unit!r}")
        if unit == "block" and match == "float":
            raise ValueError("match=float is a layer's aim; a block always aims at the float model's output")
        self.unit = unit
        self.iterations = iterations
        self.lr = lr or 1 / iterations
        self.ranges = ranges
        self.match = match
        self.ridge = ridge

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError where a layer's levels are not evenly spaced."""
        check_even(self.name, model)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Improve every unit, in order of execution."""
        if self.unit == "layer":
            super().fit(model, reference, data, task, recipe, trainer)
            return
        walk(
            model,
            data,
            task,
            find_units(model, self.unit),
            lambda unit: self._improve_block(model, unit),
            num_samples=self.num_samples,
            memory_gb=self.memory_gb,
            title=self.name,
            shelf=recipe.shelf,
        )

    def _improve_block(self, model: nn.Module, unit: Unit) -> None:
        def learn(_: float) -> None:
            with learning(model, unit.module, self._offset) as (offsets, _steps):
                learned = [p for offset in offsets for p in offset.parameters() if p.requires_grad]
                for i, b in enumerate(_shuffled(len(unit.calls), self.iterations)):
                    with torch.enable_grad():
                        grads = torch.autograd.grad(batch_error(unit, b), learned)
                    for parameter, grad in zip(learned, grads, strict=True):
                        parameter.sub_(self.lr * (1 - i / self.iterations) * grad.sign())
                    for offset in offsets:
                        offset.constrain()

        keep_if_better(self.name, unit, learn)

    def _offset(self, weight: QuantizedWeight) -> Offset:
        slot = weight.fake_quant.slot
        blocks = slot.granularity.to_blocks(weight.blocks_input())
        return Offset(slot, weight.fake_quant.qparams(), blocks, self.ranges)

    def improve(self, layer: Layer) -> None:
        """Replace the weight and its qparams by the best of all steps."""
        levels, goal = Levels(layer), goal_of(layer, self.match, self.ridge)
        nearest, before = levels.round(goal.aim), layer.fake_quant.qparams()
        rounded, qparams = self._learn(layer, levels, goal.in_float32())
        if self.ranges:
            layer.fake_quant.set_qparams(qparams)
        if goal.error(rounded).sum() > goal.error(nearest).sum():
            layer.fake_quant.set_qparams(before)
            rounded = nearest
        elif not self.ranges:
            rounded = rounded.to(nearest)
            fall_back(rounded, nearest, goal.error)
        keep(layer, levels, rounded, goal)

    def _learn(self, layer: Layer, levels: Levels, goal: Goal) -> tuple[Tensor, QParams]:
        slot, start, aim = layer.fake_quant.slot, layer.fake_quant.qparams(), goal.aim
        ends = _ends(slot, start)
        offset = torch.zeros_like(aim).requires_grad_()
        shrink = torch.ones(2, *start.scale.shape, device=aim.device).requires_grad_(self.ranges)
        least, best, block = float("inf"), (aim, start), levels.block.long()
        with torch.enable_grad():
            for i in range(self.iterations):
                qparams = start
                if self.ranges:
                    qparams = affine_qparams(Range(ends.low * shrink[0], ends.high * shrink[1]), slot.spec)
                scale, zero_point = qparams.scale[:, 0][block], qparams.zero_point[:, 0][block]
                rounded = _rounded(aim, offset, QParams(scale, zero_point), slot.spec)
                loss = goal.error(rounded).sum()
                if loss.item() < least:
                    least, best = loss.item(), (rounded.detach(), _detached(qparams))
                learned = [offset, shrink] if self.ranges else [offset]
                grads = torch.autograd.grad(loss, learned)
                step = self.lr * (1 - i / self.iterations)
                with torch.no_grad():
                    offset.sub_(step * grads[0].sign()).clamp_(-0.5, 0.5)
                    if self.ranges:
                        shrink.sub_(step * grads[1].sign()).clamp_(0.1, 1)
        return best


class Offset(LearnedRounding):
    """A weight to whose elements something is added before they are rounded, and whose ranges shrink.

    Args:
        start: scale and zero_point, [B, 1].
        weight: [B, N].
        ranges: whether they are learned.
    """

    def __init__(self, slot: Slot, start: QParams, weight: Tensor, ranges: bool) -> None:
        super().__init__(slot)
        self.start, self.weight, self.ends = start, weight, _unrounded(slot, start, weight)
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.shrink = nn.Parameter(torch.ones(2, *start.scale.shape).to(weight), requires_grad=ranges)

    def qparams(self) -> QParams:
        """Return those of the shrunken ranges; the ends of the codes move with them.

        A single layer is learned without the zero point's gradient; each way was measured to err less there.
        """
        if not self.shrink.requires_grad:
            return self.start
        low, high = self.ends.low * self.shrink[0], self.ends.high * self.shrink[1]
        spec = self.slot.spec
        qparams = affine_qparams(Range(low, high), spec)
        if spec.symmetric:
            return qparams
        exact = spec.quant_min - low / qparams.scale
        return QParams(qparams.scale, straight_through(exact, qparams.zero_point))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded weight, in the shape of x."""
        return self._weight(x.shape)

    def rounded(self, shape: torch.Size) -> Tensor:
        """Return the weight on its codes."""
        return self._weight(shape).detach()

    def constrain(self) -> None:
        """Keep offsets within half a step, and ranges from a tenth to the whole."""
        self.offset.clamp_(-0.5, 0.5)
        self.shrink.clamp_(0.1, 1)

    def _weight(self, shape: torch.Size) -> Tensor:
        rounded = _rounded(self.weight, self.offset, self.qparams(), self.slot.spec)
        return self.slot.granularity.from_blocks(rounded, shape)


def _ends(slot: Slot, start: QParams) -> Range:
    low, high = (code - start.zero_point for code in (slot.spec.quant_min, slot.spec.quant_max))
    return Range(low * start.scale, high * start.scale)


def _unrounded(slot: Slot, start: QParams, weight: Tensor) -> Range:
    """Return the ends before the zero point was rounded: the weight's own, less than half a step away.

    A range that was clipped lies farther from them; it keeps the ends of its codes.
    """
    ends = _ends(slot, start)
    if slot.spec.symmetric:
        return ends
    least = weight.amin(1, keepdim=True).clamp(max=0)
    low = torch.where((least - ends.low).abs() < start.scale / 2, least, ends.low)
    return Range(low, low + (ends.high - ends.low))


def _shuffled(count: int, steps: int) -> Iterator[int]:
    """Yield as many indices as steps, each of count once, in random order, before one comes again."""
    draw = torch.Generator().manual_seed(0)
    while steps > 0:
        yield from torch.randperm(count, generator=draw)[:steps].tolist()
        steps -= count


def _rounded(weight: Tensor, offset: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    codes = round_ste(weight / qparams.scale + offset)
    zero_point = qparams.zero_point
    return codes.clamp(spec.quant_min - zero_point, spec.quant_max - zero_point) * qparams.scale


def _detached(qparams: QParams) -> QParams:
    return QParams(qparams.scale.detach(), qparams.zero_point.detach())


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer AutoRound."""
    return [AutoRound]

"""Learn offsets and ranges of the rounding by signed gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, QParams, QuantSpec, Range, RecipeError, hookimpl
from qpipe.functional import affine_qparams, round_ste
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.quadratic import Goal, Levels, fall_back, goal_of, keep
from qpipe_methods.reconstruction import Layer


class AutoRound(LayerwiseStrategy):
    """Learn what is added to each weight before it is rounded, and how far each range shrinks.

    The best step is kept. The error is taken over all samples, from second moments, a layer at a time.

    Args:
        iterations: steps a layer; the step falls linearly from lr.
        lr: of signed gradient descent; None: 1 / iterations.
        ranges: learn the ranges too; False: only the offsets.
        match, ridge: as for GPTQ.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Cheng et al., 2023, arXiv 2309.05516, eqs. 3 to 5.
    Equation: W = s clip(round(W / s + V)); V <- V - lr sign(∂L / ∂V)
    """

    name = "autoround"

    def __init__(
        self,
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
        self.iterations = iterations
        self.lr = lr or 1 / iterations
        self.ranges = ranges
        self.match = match
        self.ridge = ridge

    def improve(self, layer: Layer) -> None:
        """Replace the weight and its qparams by the best of all steps."""
        slot = layer.fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            raise RecipeError(
                f"autoround needs even steps; quantizer '{slot.quantizer.name}' of '{layer.name}' has none"
            )
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
        ends = Range(
            (slot.spec.quant_min - start.zero_point) * start.scale,
            (slot.spec.quant_max - start.zero_point) * start.scale,
        )
        offset = torch.zeros_like(aim).requires_grad_()
        shrink = torch.ones(2, *start.scale.shape, device=aim.device).requires_grad_(self.ranges)
        least, best, block = float("inf"), (aim, start), levels.block.long()
        with torch.enable_grad():
            for i in range(self.iterations):
                qparams = start
                if self.ranges:
                    qparams = affine_qparams(Range(ends.low * shrink[0], ends.high * shrink[1]), slot.spec)
                rounded = _rounded(aim, offset, qparams, block, slot.spec)
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


def _rounded(aim: Tensor, offset: Tensor, qparams: QParams, block: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero_point = qparams.scale[:, 0][block], qparams.zero_point[:, 0][block]
    codes = round_ste(aim / scale + offset)
    return codes.clamp(spec.quant_min - zero_point, spec.quant_max - zero_point) * scale


def _detached(qparams: QParams) -> QParams:
    return QParams(qparams.scale.detach(), qparams.zero_point.detach())


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer AutoRound."""
    return [AutoRound]

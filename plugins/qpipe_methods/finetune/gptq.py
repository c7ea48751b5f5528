"""Round column by column; the columns not yet rounded make up for the error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qpipe import FinetuneStrategy, QParams, RecipeError, hookimpl
from qpipe.functional import scale_eps
from qpipe_methods.finetune._layerwise import LayerwiseStrategy, check_even
from qpipe_methods.quadratic import Goal, Levels, added_by, fall_back, goal_of, set_bias, shrink
from qpipe_methods.reconstruction import Layer

_ROWS = 128  # that are copied at once


class GPTQ(LayerwiseStrategy):
    """Compensate each rounding error by second-order information; linear layers and all convolutions.

    The result is kept where it has less error than rounding to nearest, output by output.

    Args:
        act_order: round the inputs of most energy first.
        block_size: columns after which the rest is updated, at once.
        damping: share of the mean diagonal added to the Hessian.
        shrinkage: share of the Hessian's off-diagonal that is taken away; 1 is rounding to nearest. Data of
            few kinds overstates correlations, which costs on other data.
        scales: ranges tried, from 0.6 to 1.1 of the present one, each with all of the above; every output
            takes the one it errs least with, or all together where they share a scale. 0: the present one.
        sweeps: passes of coordinate descent over the codes afterwards; 0 is GPTQ as published.
        match: 'float' aims at what the float model gives, so that earlier errors are made up for too; 'layer'
            at what the float layer makes of the quantized inputs, as published.
        ridge: share of the mean diagonal that holds the aim to the float weight, for match=float.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Frantar et al., 2022, arXiv 2210.17323, algorithm 1.
    Equation: e = (w_q - Q(w_q)) / [H⁻¹]_qq; w_rest <- w_rest - e [H⁻¹]_q,rest
    """

    name = "gptq"

    def __init__(
        self,
        act_order: bool = True,
        block_size: int = 128,
        damping: float = 0.01,
        shrinkage: float = 0.0,
        scales: int = 0,
        sweeps: int = 0,
        match: str = "layer",
        ridge: float = 0.1,
        num_samples: int = 128,
        memory_gb: float = 4.0,
    ) -> None:
        super().__init__(num_samples, memory_gb)
        if match not in ("layer", "float"):
            raise ValueError(f"match is layer or float, not {match!r}")
        self.act_order = act_order
        self.block_size = block_size
        self.damping = damping
        self.shrinkage = shrinkage
        self.scales = scales
        self.sweeps = sweeps
        self.match = match
        self.ridge = ridge

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError where scales are searched of levels that are not evenly spaced."""
        if self.scales:
            check_even("gptq.scales", model)

    def improve(self, layer: Layer) -> None:
        """Replace the weight by its compensated rounding."""
        levels, goal = Levels(layer), goal_of(layer, self.match, self.ridge)
        shrink(goal.xx, self.shrinkage)
        hessian = goal.xx.clone() if self.sweeps else goal.xx
        compensation = Compensation(goal.aim, hessian, self.damping, self.act_order)
        rounded = compensation.rounded(levels, self.block_size)
        if self.scales:
            ratios = torch.linspace(0.6, 1.1, self.scales).tolist()
            rounded = best_scales(layer, levels, rounded, compensation, ratios, self.block_size)
        for _ in range(self.sweeps):
            rounded = descended(rounded, goal, levels)
        fall_back(rounded, levels.round(goal.aim), compensation.error)
        set_bias(layer, rounded, goal)
        del goal, hessian, compensation  # before the weight takes memory of its own
        layer.weight.copy_(levels.weight(rounded))


class Compensation:
    """Round an aim column by column; what is left of it makes up for the error.

    Args:
        aim: [G, O, K], the real weight.
        hessian: [G, K, K], mean of x x' over the inputs; overwritten by the upper factor of its inverse.
        damping: share of the mean diagonal added to the hessian.
        act_order: round the inputs of most energy first.

    Raises:
        RecipeError: the damped hessian is not positive definite.
    """

    def __init__(self, aim: Tensor, hessian: Tensor, damping: float = 0.0, act_order: bool = True) -> None:
        added = added_by(damping, hessian)
        energy = hessian.diagonal(dim1=1, dim2=2) + added
        order = torch.arange(energy.shape[1], device=energy.device).expand(energy.shape)
        self.order = energy.argsort(1, descending=True) if act_order else order
        self.aim = aim
        self.added = added.gather(1, self.order)
        self.factor = hessian
        _reorder(self.factor, self.order, 1)
        _reorder(self.factor, self.order, 2)
        self.factor.diagonal(dim1=1, dim2=2).add_(self.added)
        _invert_and_factorize(self.factor)

    def error(self, weight: Tensor) -> Tensor:
        """Return the mean squared distance from the outputs of aim for each output of weight, [G, O]."""
        found = []
        for part, aim in zip(torch.split(weight, _ROWS, 1), torch.split(self.aim, _ROWS, 1), strict=True):
            change = (part.to(self.factor) - aim).gather(2, self.order[:, None].expand_as(part))
            whitened = torch.linalg.solve_triangular(self.factor, change, upper=True, left=False)
            damping = change.square_() @ self.added[:, :, None]
            found.append(whitened.square_().sum(2) - damping[:, :, 0])
        return torch.cat(found, 1)

    def rounded(self, levels: Levels, block_size: int = 128) -> Tensor:
        """Return the levels chosen, [G, O, K] in float32.

        Args:
            block_size: columns after which the rest is updated, at once.
        """
        left = self.aim.to(self.factor, copy=True)
        _reorder(left, self.order, 2)
        columns, factor = left.shape[2], self.factor
        qparams = levels.columns(self.order)
        for start in range(0, columns, block_size):
            end = min(start + block_size, columns)
            errors = torch.empty_like(left[:, :, start:end])
            for j in range(start, end):
                level = levels.round_column(left[:, :, j], next(qparams))
                error = (left[:, :, j] - level) / factor[:, j, j, None]
                left[:, :, j] = level
                left[:, :, j + 1 : end].addcmul_(error[:, :, None], factor[:, None, j, j + 1 : end], value=-1)
                errors[:, :, j - start] = error
            left[:, :, end:].baddbmm_(errors, factor[:, start:end, end:], alpha=-1)
        _reorder(left, self.order.argsort(1), 2)
        return left.float()  # exactly: levels are float32


def _reorder(x: Tensor, order: Tensor, dim: int) -> None:
    """Put x [G, *, *] in order [G, K] along a dimension, in place."""
    shape = [len(order), 1, 1]
    shape[dim] = -1
    for part in torch.split(x, _ROWS, 3 - dim):
        part.copy_(part.gather(dim, order.reshape(shape).expand_as(part)))


def _invert_and_factorize(x: Tensor) -> None:
    """Replace symmetric matrices [G, K, K] by the upper Cholesky factors of their inverses, in place.

    Raises:
        RecipeError: one is not positive definite.
    """
    lower = x.mT  # stored column by column as LAPACK wants it, which then makes no copy
    _cholesky(lower)
    torch.cholesky_inverse(lower, out=lower)
    _cholesky(lower)


def _cholesky(x: Tensor) -> None:
    info = torch.empty(len(x), dtype=torch.int32, device=x.device)
    torch.linalg.cholesky_ex(x, out=(x, info))
    if info.any():
        raise RecipeError("gptq: inputs of a layer depend on each other; raise finetune.gptq.damping")


def best_scales(
    layer: Layer,
    levels: Levels,
    rounded: Tensor,
    compensation: Compensation,
    ratios: Sequence[float],
    block_size: int,
) -> Tensor:
    """Set each scale to the multiple of itself with which rounding errs least; return the rounded weight.

    Args:
        rounded: [G, O, K], with the present scales.
    """
    start = layer.fake_quant.qparams()
    scale, least = start.scale, compensation.error(rounded)
    for ratio in ratios:
        tried_scale = (start.scale * ratio).clamp(min=scale_eps(layer.fake_quant.slot.spec.num_bits))
        layer.fake_quant.set_qparams(QParams(tried_scale, start.zero_point))
        tried = compensation.rounded(levels, block_size)
        error = compensation.error(tried)
        better = error < least if levels.apart else (error.sum() < least.sum()).expand_as(error)
        least, rounded = torch.where(better, error, least), torch.where(better[:, :, None], tried, rounded)
        blocks = levels.block[better].flatten().long()  # some more than once, always with one value
        scale = scale.index_copy(0, blocks, tried_scale[blocks])
    layer.fake_quant.set_qparams(QParams(scale, start.zero_point))
    return rounded


def descended(rounded: Tensor, goal: Goal, levels: Levels) -> Tensor:
    """Move each column in turn to the level that is best while the others stay; the error only falls."""
    rounded = rounded.to(goal.xx, copy=True)
    slope = (rounded - goal.aim) @ goal.xx  # half the gradient of the error
    every = torch.arange(rounded.shape[2], device=rounded.device).expand(len(rounded), -1)
    for j, qparams in enumerate(levels.columns(every)):
        curvature = goal.xx[:, j, j, None]
        best = rounded[:, :, j] - torch.where(curvature > 0, slope[:, :, j] / curvature, 0)
        moved = levels.round_column(best, qparams) - rounded[:, :, j]
        rounded[:, :, j] += moved
        slope += moved[:, :, None] * goal.xx[:, None, j]
    return rounded.float()


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer GPTQ."""
    return [GPTQ]

"""Round column by column; the columns not yet rounded make up for the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, QParams, RecipeError, hookimpl
from qpipe.functional import scale_eps
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.quadratic import Levels, Moments, added_by, goal_of, keep, moments, no_worse
from qpipe_methods.reconstruction import Layer


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

    def improve(self, layer: Layer) -> None:
        """Replace the weight by its compensated rounding."""
        levels = Levels(layer)
        weight = levels.rows(layer.weight)
        aim, goal = goal_of(moments(layer), weight, self.match, self.ridge, self.shrinkage)

        def round_to(levels: Levels) -> Tensor:
            return compensated(aim, goal.xx, levels, self.block_size, self.act_order, self.damping)

        rounded = round_to(levels)
        if self.scales:
            ratios = torch.linspace(0.6, 1.1, self.scales).tolist()
            rounded = best_scales(layer, levels, rounded, goal, ratios, round_to)
        for _ in range(self.sweeps):
            rounded = descended(rounded, goal, levels)
        keep(layer, levels, no_worse(rounded, levels.round(aim), goal), goal)


def best_scales(
    layer: Layer,
    levels: Levels,
    rounded: Tensor,
    goal: Moments,
    ratios: Sequence[float],
    round_to: Callable[[Levels], Tensor],
) -> Tensor:
    """Set each scale to the multiple of itself with which rounding errs least; return the rounded weight.

    Args:
        rounded: [G, O, K], with the present scales.
        round_to: rounds with the scales that are set.

    Raises:
        RecipeError: the quantizer's levels are not even.
    """
    slot, start = layer.fake_quant.slot, layer.fake_quant.qparams()
    if not slot.quantizer.is_affine(slot.spec):
        raise RecipeError(
            f"quantizer '{slot.quantizer.name}' of '{layer.name}' has no scale to search; use scales=0"
        )
    scale, least = start.scale, goal.error(rounded)
    for ratio in ratios:
        tried_scale = (start.scale * ratio).clamp(min=scale_eps(slot.spec.num_bits))
        layer.fake_quant.set_qparams(QParams(tried_scale, start.zero_point))
        tried = round_to(levels)
        error = goal.error(tried)
        better = error < least if levels.apart else (error.sum() < least.sum()).expand_as(error)
        least, rounded = torch.where(better, error, least), torch.where(better[:, :, None], tried, rounded)
        blocks = levels.block[better].flatten()  # some more than once, always with one value
        scale = scale.index_copy(0, blocks, tried_scale[blocks])
    layer.fake_quant.set_qparams(QParams(scale, start.zero_point))
    return rounded


def compensated(
    weight: Tensor,
    hessian: Tensor,
    levels: Levels,
    block_size: int = 128,
    act_order: bool = True,
    damping: float = 0.0,
) -> Tensor:
    """Return the levels GPTQ chooses for weight [G, O, K] under hessian [G, K, K].

    Args:
        damping: share of the mean diagonal added to the hessian.
    """
    added = added_by(damping, hessian)
    energy = hessian.diagonal(dim1=1, dim2=2) + added
    order = (
        energy.argsort(1, descending=True)
        if act_order
        else torch.arange(energy.shape[1]).expand(energy.shape)
    )
    order = order.to(weight.device)
    factor = _inverse_factor(hessian, added, order)
    left = weight.gather(2, order[:, None].expand_as(weight)).clone()
    result = torch.empty_like(left)
    columns = left.shape[2]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty_like(left[:, :, start:end])
        for j in range(start, end):
            result[:, :, j] = levels.round_column(left[:, :, j], order[:, j])
            error = (left[:, :, j] - result[:, :, j]) / factor[:, j, j, None]
            left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            errors[:, :, j - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(result).scatter_(2, order[:, None].expand_as(result), result)


def descended(rounded: Tensor, goal: Moments, levels: Levels) -> Tensor:
    """Move each column in turn to the level that is best while the others stay; the error only falls."""
    rounded = rounded.clone()
    slope = rounded @ goal.xx - goal.xy.mT  # half the gradient of the error
    for j in range(rounded.shape[2]):
        curvature = goal.xx[:, j, j, None]
        best = rounded[:, :, j] - torch.where(curvature > 0, slope[:, :, j] / curvature, 0)
        moved = levels.round_column(best, j) - rounded[:, :, j]
        rounded[:, :, j] += moved
        slope += moved[:, :, None] * goal.xx[:, None, j]
    return rounded


def _inverse_factor(hessian: Tensor, added: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse, rows and columns in order [G, K].

    Each matrix is let go of as soon as the next is there: two [G, K, K] at most.
    """
    group = torch.arange(len(hessian), device=hessian.device)[:, None, None]
    factor = hessian[group, order[:, :, None], order[:, None]]
    factor.diagonal(dim1=1, dim2=2).add_(added.gather(1, order))
    factor = torch.linalg.cholesky(factor)
    factor = torch.cholesky_inverse(factor)
    upper: Tensor = torch.linalg.cholesky(factor, upper=True)
    return upper


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer GPTQ."""
    return [GPTQ]

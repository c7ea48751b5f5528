"""Round column by column; the columns not yet rounded make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, hookimpl
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.quadratic import Levels, Moments, goal_of, keep, moments, no_worse
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
        sweeps: passes of coordinate descent over the codes afterwards; 0 is GPTQ as published.
        match: 'float' aims at what the float model gives, so that earlier errors are made up for too; 'layer'
            at what the float layer makes of the quantized inputs, as published.
        ridge: share of the mean diagonal that holds the aim to the float weight, for match=float.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Frantar et al., 2022, arXiv 2210.17323, algorithm 1.
    """

    name = "gptq"

    def __init__(
        self,
        act_order: bool = True,
        block_size: int = 128,
        damping: float = 0.01,
        shrinkage: float = 0.0,
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
        self.sweeps = sweeps
        self.match = match
        self.ridge = ridge

    def improve(self, layer: Layer) -> None:
        """Replace the weight by its compensated rounding."""
        levels, of = Levels(layer), moments(layer)
        aim, goal = goal_of(of, levels.rows(layer.weight), self.match, self.ridge, self.shrinkage)
        rounded = compensated(aim, goal.damped(self.damping), levels, self.block_size, self.act_order)
        for _ in range(self.sweeps):
            rounded = descended(rounded, goal, levels)
        keep(layer, levels, no_worse(rounded, levels.round(aim), goal), of)


def compensated(
    weight: Tensor, hessian: Tensor, levels: Levels, block_size: int = 128, act_order: bool = True
) -> Tensor:
    """Return the levels GPTQ chooses for weight [G, O, K] under hessian [G, K, K]."""
    energy = hessian.diagonal(dim1=1, dim2=2)
    order = (
        energy.argsort(1, descending=True)
        if act_order
        else torch.arange(energy.shape[1]).expand(energy.shape)
    )
    order = order.to(weight.device)
    factor = _inverse_factor(
        hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    )
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


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer GPTQ."""
    return [GPTQ]

"""Set the smallest weights to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpipe import RecipeError, Transform, hookimpl

if TYPE_CHECKING:
    from qpipe import Recipe, Task
    from qpipe.task import Batches

_PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PruneMagnitude(Transform):
    """Prune the weights of linear and convolution layers by magnitude; the function changes.

    Zero is a level of every uniform quantizer and training keeps zeros, so pruned weights stay pruned. Two
    numbers n, m keep the n largest of every m consecutive inputs instead of a share; a layer whose inputs m
    does not divide is left as it is.

    Args:
        sparsity: share of each layer's weights set to zero.
        n: kept of every m; None prunes by share.
        m: consecutive inputs that share a budget.

    Source: Han et al., 2015, arXiv 1506.02626; n of m: Mishra et al., 2021, arXiv 2104.08378.
    Equation: w = 0 where |w| is among the smallest
    """

    name = "prune_magnitude"

    def __init__(self, sparsity: float = 0.5, n: int | None = None, m: int = 4) -> None:
        if not 0 <= sparsity < 1:
            raise RecipeError(f"transform.prune_magnitude.sparsity={sparsity} lies outside 0 to 1")
        if n is not None and not 0 < n < m:
            raise RecipeError(f"transform.prune_magnitude keeps n={n} of m={m}; use 0 < n < m")
        self.sparsity = sparsity
        self.n = n
        self.m = m

    @torch.no_grad()
    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Prune in place; no data is read."""
        for module in model.modules():
            if isinstance(module, _PRUNED):
                module.weight.mul_(self.mask(module.weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Return 1 where weight [O, I, *] is kept, 0 elsewhere."""
        if self.n is None:
            return largest_share(weight.abs(), 1 - self.sparsity)
        if weight.shape[1] % self.m:
            return torch.ones_like(weight)
        return largest_of_each(weight.abs(), self.n, self.m)


def largest_share(score: Tensor, share: float) -> Tensor:
    """Return 1 at the round(share * size) largest scores, 0 elsewhere."""
    count = round(share * score.numel())
    mask = torch.zeros_like(score).flatten()
    mask[score.flatten().topk(count).indices] = 1
    return mask.view_as(score)


def largest_of_each(score: Tensor, n: int, m: int) -> Tensor:
    """Return 1 at the n largest scores [O, I, *] of every m consecutive inputs, 0 elsewhere."""
    groups: Tensor = score.movedim(1, -1).unflatten(-1, (-1, m))  # type: ignore[no-untyped-call]
    mask = torch.zeros_like(groups).scatter(-1, groups.topk(n, -1).indices, 1.0)
    return mask.flatten(-2).movedim(-1, 1)


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer magnitude pruning."""
    return [PruneMagnitude]

"""Which weights are kept: by share, or n of every m."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpipe import RecipeError

PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_budget(where: str, sparsity: float, n: int | None, m: int) -> None:
    """Refuse a budget that has no meaning.

    Raises:
        RecipeError: sparsity lies outside 0 to 1, or n outside 0 to m.
    """
    if not 0 <= sparsity < 1:
        raise RecipeError(f"{where}.sparsity={sparsity} lies outside 0 to 1; 0.5 prunes half the weights")
    if n is not None and not 0 < n < m:
        raise RecipeError(f"{where} keeps n={n} of m={m}; use 0 < n < m")


def check_divides(where: str, weights: list[Tensor], m: int) -> None:
    """Refuse an m that divides the inputs of no weight [O, I, *]."""
    if all(weight.shape[1] % m for weight in weights):
        raise RecipeError(f"{where}.m={m} divides the inputs of no layer; choose another m, or leave out n")


def largest_share(score: Tensor, share: float) -> Tensor:
    """Return 1 at the round(share * N) largest scores of each row [*, N], 0 elsewhere."""
    kept = score.topk(round(share * score.shape[-1])).indices
    return torch.zeros_like(score).scatter(-1, kept, 1.0)


def largest_of_each(score: Tensor, n: int, m: int) -> Tensor:
    """Return 1 at the n largest scores [O, I, *] of every m consecutive inputs, 0 elsewhere.

    All is kept where m does not divide I.
    """
    if score.shape[1] % m:
        return torch.ones_like(score)
    groups: Tensor = score.movedim(1, -1).unflatten(-1, (-1, m))  # type: ignore[no-untyped-call]
    return largest_share(groups, n / m).flatten(-2).movedim(-1, 1)

"""One scale for each row of an activation, taken as it passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qpipe import Granularity, RecipeError, Role, hookimpl


class PerToken(Granularity):
    """Activation [*rows, features] -> blocks [rows, features]; needs dynamic ranges.

    Source: Yao et al., ZeroQuant, 2022, arXiv 2206.01861.
    """

    name = "token"
    roles = frozenset({Role.ACTIVATION})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.WEIGHT: "channel"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.WEIGHT: "a weight has no tokens; its output channels are its rows"
    }
    dynamic_only = True

    def to_blocks(self, x: Tensor) -> Tensor:
        """View each row of features as a block."""
        return x.reshape(-1, x.shape[-1])

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks."""
        return blocks.reshape(shape)

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise RecipeError when there are no rows."""
        if len(shape) < 2:
            raise RecipeError(
                f"granularity 'token': '{name}' has shape {list(shape)}, but needs rows of features, [N, D]"
            )

    def describe(self, shape: torch.Size) -> str:
        """Say how many features a token has."""
        return f"tokens of {shape[-1]}"


@hookimpl
def qpipe_register_granularity() -> list[type[Granularity]]:
    """Offer one scale a token."""
    return [PerToken]

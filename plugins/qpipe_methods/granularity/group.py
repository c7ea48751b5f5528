"""One scale for each group of neighbouring output channels of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qpipe import Granularity, RecipeError, Role, hookimpl


class PerGroup(Granularity):
    """Weight [C, *rest] -> blocks [num_groups, N].

    Args:
        num_groups: parts the channels are split into; divides them.

    Source: Shen et al., Q-BERT, 2019, arXiv 1909.05840.
    """

    name = "group"
    roles = frozenset({Role.WEIGHT})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.ACTIVATION: "layer"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.ACTIVATION: "a matmul sums over the channels of its input, and scales that differ inside a sum "
        "cannot be taken out of it"
    }

    def __init__(self, num_groups: int = 4) -> None:
        if num_groups < 1:
            raise RecipeError(f"granularity 'group': num_groups must be at least 1, not {num_groups}")
        self.num_groups = num_groups

    def to_blocks(self, x: Tensor) -> Tensor:
        """View each group of channels as a block."""
        return x.reshape(self.num_groups, -1)

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks."""
        return blocks.reshape(shape)

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise RecipeError when num_groups does not divide the output channels."""
        if shape[0] % self.num_groups:
            raise RecipeError(
                f"granularity 'group': num_groups {self.num_groups} does not divide {shape[0]}, "
                f"the output channels of '{name}'"
            )

    def describe(self, shape: torch.Size) -> str:
        """Say how many groups there are, and how large."""
        return f"{self.num_groups} groups of {shape[0] // self.num_groups} channels"


@hookimpl
def qpipe_register_granularity() -> list[type[Granularity]]:
    """Offer one scale a group of channels."""
    return [PerGroup]

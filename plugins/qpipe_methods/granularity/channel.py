"""One scale for each output channel of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qpipe import Granularity, Role, hookimpl


class PerChannel(Granularity):
    """Weight [C, *rest] -> blocks [C, N].

    Source: Krishnamoorthi, 2018, arXiv 1806.08342.
    """

    name = "channel"
    roles = frozenset({Role.WEIGHT})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.ACTIVATION: "layer"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.ACTIVATION: "a matmul sums over the channels of its input, and scales that differ inside a sum "
        "cannot be taken out of it"
    }

    def to_blocks(self, x: Tensor) -> Tensor:
        """View each output channel as a block."""
        return x.reshape(x.shape[0], -1)

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks."""
        return blocks.reshape(shape)

    def describe(self, shape: torch.Size) -> str:
        """Say how many channels there are."""
        return f"{shape[0]} channels"


@hookimpl
def qpipe_register_granularity() -> list[type[Granularity]]:
    """Offer one scale a channel."""
    return [PerChannel]

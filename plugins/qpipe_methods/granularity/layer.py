"""One scale for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import Granularity, hookimpl


class PerLayer(Granularity):
    """x [*shape] -> blocks [1, N]."""

    name = "layer"

    def to_blocks(self, x: Tensor) -> Tensor:
        """View x as one block."""
        return x.reshape(1, -1)

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks."""
        return blocks.reshape(shape)


@hookimpl
def qpipe_register_granularity() -> list[type[Granularity]]:
    """Offer one scale a tensor."""
    return [PerLayer]

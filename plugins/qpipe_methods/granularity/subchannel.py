"""One scale for each few consecutive inputs of an output channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe import Granularity, RecipeError, Role, hookimpl


class PerSubchannel(Granularity):
    """Weight [C, *rest] -> blocks [C * K / group_size, group_size], K inputs a channel.

    A channel of fewer than group_size inputs (a depthwise filter) is one block.

    Args:
        group_size: consecutive inputs that share a scale.
        pad: fill the last group of a channel with zeros where group_size does not divide; else an error.

    Source: Gholami et al., 2021, arXiv 2103.13630, III-E.
    """

    name = "subchannel"
    roles = frozenset({Role.WEIGHT})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.ACTIVATION: "layer"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.ACTIVATION: "scales that change along the inputs of a matmul split its sum into one a group, "
        "which only a dynamic block format has"
    }

    def __init__(self, group_size: int = 128, pad: bool = False) -> None:
        if group_size < 1:
            raise RecipeError(f"granularity 'subchannel': group_size must be at least 1, not {group_size}")
        self.group_size = group_size
        self.pad = pad

    def _missing(self, inputs: int) -> int:
        return -inputs % self.group_size if inputs > self.group_size else 0

    def to_blocks(self, x: Tensor) -> Tensor:
        """View each group_size inputs of a channel as a block."""
        rows = x.reshape(x.shape[0], -1)
        inputs = rows.shape[1]
        if missing := self._missing(inputs):
            rows = F.pad(rows, (0, missing))
        return rows.reshape(-1, min(self.group_size, inputs))

    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks, padding dropped."""
        inputs = shape[1:].numel()
        return blocks.reshape(shape[0], -1)[:, :inputs].reshape(shape)

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise RecipeError when group_size does not divide the inputs and pad is false."""
        inputs = shape[1:].numel()
        if self._missing(inputs) and not self.pad:
            raise RecipeError(
                f"granularity 'subchannel': group_size {self.group_size} does not divide {inputs}, "
                f"the input size of '{name}'; choose another or set granularity.pad=true"
            )

    def describe(self, shape: torch.Size) -> str:
        """Say how many blocks there are, and how large."""
        inputs = shape[1:].numel()
        if inputs < self.group_size:
            return f"{shape[0]} channels of {inputs} (fewer than group_size {self.group_size})"
        return f"{shape[0] * -(-inputs // self.group_size)} blocks of {self.group_size}"


@hookimpl
def qpipe_register_granularity() -> list[type[Granularity]]:
    """Offer one scale a few inputs."""
    return [PerSubchannel]

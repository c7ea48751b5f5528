"""Which elements share quantization parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qpipe.types import Role


class Granularity(ABC):
    """View a tensor as blocks [B, N] and undo it; nothing else sees a channel, a group or a token.

    A weight arrives with its output channels in dimension 0, whatever layout its module keeps.
    Blocks are views wherever the memory layout admits one.
    """

    name: ClassVar[str]
    roles: ClassVar[frozenset[Role]] = frozenset(Role)
    stand_in: ClassVar[Mapping[Role, str]] = {}  # serves a role this one does not
    why_not: ClassVar[Mapping[Role, str]] = {}  # why an unserved role has no meaning, for the error
    dynamic_only: ClassVar[bool] = False  # the number of blocks depends on the tensor

    @abstractmethod
    def to_blocks(self, x: Tensor) -> Tensor:
        """View x [*shape] as blocks [B, N]."""

    @abstractmethod
    def from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Undo to_blocks exactly: blocks [B, N] -> [*shape]."""

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise RecipeError when a tensor of this shape, called name, cannot be split so."""

    def describe(self, shape: torch.Size) -> str:
        """Say in a few words how a tensor of this shape is split ('64 channels')."""
        return self.name

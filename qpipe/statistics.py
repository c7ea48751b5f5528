"""Facts about the blocks of one tensor: mergeable, in any order, to the same integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor

from qpipe.types import Range


class Statistics(ABC):
    """What was seen of B blocks."""

    @abstractmethod
    def update(self, blocks: Tensor) -> None:
        """Take in blocks [B, N], once a batch."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return what observing both streams would have given."""

    @abstractmethod
    def extremes(self) -> Range:
        """Return the least and the largest value of each block, [B, 1]."""


class Extremes(Statistics):
    """Least and largest value of each block."""

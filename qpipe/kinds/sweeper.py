"""What chooses the points of a sweep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Choice:
    """Values without an order, as they are typed: choice(a,b), or a,b."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high, both included: interval(low,high), or range(low,stop,step).

    Args:
        low, high: whole numbers where both are int.
        step: between them; None: any, or every whole number.
        log: tag(log,interval(…)): ratios count, not differences.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False


Domain = Choice | Interval


@dataclass(frozen=True)
class Trial:
    """A point of the space.

    Args:
        number: 0, 1, … without a gap; the job's.
        values: a value for each word, as it is typed.
    """

    number: int
    values: Mapping[str, str]


class Sweeper(ABC):
    """Choose points by what earlier ones gave, until there are enough; the folder remembers them.

    Args of every constructor that has them: what is looked at, how many points there are in all.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def needs(self) -> Sequence[str]:
        """Return the figures it looks at, as 'variant.metric'."""

    @property
    @abstractmethod
    def total(self) -> int:
        """Return how many points there will be, those of earlier commands counted."""

    @property
    @abstractmethod
    def identity(self) -> Any:  # noqa: ANN401  # plain data
        """Return what makes it another search when it changes; how long it goes on does not."""

    @abstractmethod
    def open(self, space: Mapping[str, Domain], folder: Path, name: str) -> Sequence[Trial]:
        """Begin the search of a name, or go on with it; return the points that it has had, in order."""

    @abstractmethod
    def ask(self) -> Sequence[Trial]:
        """Return points to be tried next, numbered on; none when there are enough."""

    @abstractmethod
    def tell(self, number: int, figures: Mapping[str, float] | None) -> None:
        """Take the figures of a point, by 'variant.metric'; None: it failed. What is known stays."""

    def findings(self) -> Sequence[str]:
        """Say what was found so far, a sentence each."""
        return ()

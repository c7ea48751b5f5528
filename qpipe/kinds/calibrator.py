"""Which range a block gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qpipe.statistics import Extremes, Statistics
from qpipe.types import QuantSpec, Range, Role

if TYPE_CHECKING:
    from qpipe.kinds.quantizer import Quantizer

S_contra = TypeVar("S_contra", bound=Statistics, contravariant=True)


class Calibrator(ABC, Generic[S_contra]):
    """Turn what was seen of B blocks into a range for each; stateless, vectorised over blocks."""

    name: ClassVar[str]
    roles: ClassVar[frozenset[Role]] = frozenset(Role)
    stand_in: ClassVar[Mapping[Role, str]] = {}
    why_not: ClassVar[Mapping[Role, str]] = {}
    needs: ClassVar[type[Statistics]] = Extremes
    dynamic: ClassVar[bool] = True  # can range a single tensor as it passes

    @abstractmethod
    def range(self, stats: S_contra, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Decide low and high, each [B, 1], for the levels the quantizer has."""


AnyCalibrator = Calibrator[Any]

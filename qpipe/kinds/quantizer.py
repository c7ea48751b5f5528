"""Which levels a block's values are rounded to."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from qpipe.functional import Rounding, straight_through
from qpipe.statistics import Extremes, Statistics
from qpipe.types import QParams, QuantSpec, Range, Role

S_contra = TypeVar("S_contra", bound=Statistics, contravariant=True)


class Quantizer(ABC, Generic[S_contra]):
    """Map reals to codes and codes to reals, block by block; stateless.

    Every method works on blocks x [B, N] with qparams [B, 1]; affine ones may also meet any x, with
    qparams of one element shaped to broadcast over it.
    """

    name: ClassVar[str]
    roles: ClassVar[frozenset[Role]] = frozenset(Role)
    stand_in: ClassVar[Mapping[Role, str]] = {}
    needs: ClassVar[type[Statistics]] = Extremes
    uses_range: ClassVar[bool] = True  # False: fitted to the statistics, no calibrator is asked
    rounding: Rounding = "nearest"  # an option of those that round: 'stochastic' while a model trains

    @abstractmethod
    def fit(self, stats: S_contra, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit the levels of each block to its range [B, 1], or to its statistics."""

    @abstractmethod
    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to codes [B, num_codes(N)]: integers, held in x's floating dtype, round half to even."""

    @abstractmethod
    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the real values codes stand for."""

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes straight through inside the range."""
        return straight_through(x, self.dequantize(self.quantize(x, qparams, spec), qparams, spec))

    def rows(self, qparams: QParams, rows: slice) -> QParams:
        """Return the parameters of some blocks, for work done a chunk at a time."""
        extra = {name: value[rows] for name, value in qparams.extra.items()}
        return QParams(qparams.scale[rows], qparams.zero_point[rows], extra)

    def settled(self) -> Self:
        """Return the quantizer that evaluation and export use: the one that rounds to nearest."""
        if self.rounding == "nearest":
            return self
        settled = copy.copy(self)
        settled.rounding = "nearest"
        return settled

    def check(self, spec: QuantSpec) -> None:
        """Raise RecipeError when the spec has no meaning for these levels."""

    def code_bits(self, spec: QuantSpec) -> int:
        """Bits a packed code takes."""
        return spec.num_bits

    def num_codes(self, num_values: int) -> int:
        """Codes of a block of so many values: one each, unless a code stands for several."""
        return num_values

    def code_min(self, spec: QuantSpec) -> int:
        """Least code: subtracted before packing."""
        return spec.quant_min

    def is_affine(self, spec: QuantSpec) -> bool:
        """Whether codes are scale * (code - zero_point), which integer engines execute."""
        return False


AnyQuantizer = Quantizer[Any]

"""Facts about the blocks of one tensor: mergeable, in any order, to the same integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.types import Range

if TYPE_CHECKING:
    from qpipe.kinds.quantizer import Quantizer
    from qpipe.types import QuantSpec

_CHUNK = 1 << 16  # elements worked on at a time: three float32 copies stay in a core's cache


class Statistics(ABC):
    """What was seen of B blocks."""

    @classmethod
    def start(cls, rank: int = 0, world_size: int = 1) -> Self:
        """Return empty statistics of a process that sees batches rank, rank + world_size, ..."""
        return cls()

    @abstractmethod
    def update(self, blocks: Tensor) -> None:
        """Take in blocks [B, N], once a batch."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return what observing both streams would have given."""

    @abstractmethod
    def extremes(self) -> Range:
        """Return the least and the largest value of each block, [B, 1]; NaN where NaN was seen."""

    def state(self) -> dict[str, Tensor]:
        """Return what was seen as tensors of first dimension B (0: nothing yet), for other ranks."""
        raise NotImplementedError(f"{type(self).__name__} does not stream: it has no state to send")

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild from state()."""
        raise NotImplementedError(f"{cls.__name__} does not stream: it has no state to load")

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Join statistics of several tensors into one of all their blocks, so that calibrators run once."""
        states = [part.state() for part in parts]
        return cls.from_state({key: torch.cat([state[key] for state in states]) for key in states[0]})

    @property
    def seen(self) -> bool:
        """Whether anything was seen."""
        return len(self.extremes().low) > 0

    def is_finite(self) -> bool:
        """Whether neither NaN nor infinity was seen."""
        ends = self.extremes()
        return bool(torch.isfinite(ends.low).all() & torch.isfinite(ends.high).all())


def _extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and largest, each [B, 1]: amin and amax reduce rows 5 times faster than aminmax(dim=1)."""
    if blocks.shape[0] == 1:
        low, high = torch.aminmax(blocks)
    else:
        low, high = blocks.amin(1), blocks.amax(1)
    return low.reshape(-1, 1).float(), high.reshape(-1, 1).float()


def _join(a: Tensor, b: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join what two streams saw; an empty one has no rows."""
    if not len(a) or not len(b):
        return b if len(b) else a
    return join(a, b.to(a.device))


class Extremes(Statistics):
    """Least and largest value of each block.

    Args:
        low, high: [B, 1], or nothing yet.
    """

    def __init__(self, low: Tensor | None = None, high: Tensor | None = None) -> None:
        self.low = torch.empty(0, 1) if low is None else low
        self.high = torch.empty(0, 1) if high is None else high

    def update(self, blocks: Tensor) -> None:
        """Widen to hold blocks [B, N]."""
        low, high = _extremes(blocks)
        self.low, self.high = _join(low, self.low, torch.minimum), _join(high, self.high, torch.maximum)

    def merge(self, other: Self) -> Self:
        """Return the wider of both."""
        low, high = _join(self.low, other.low, torch.minimum), _join(self.high, other.high, torch.maximum)
        return type(self)(low, high)

    def extremes(self) -> Range:
        """Return the least and the largest value of each block, [B, 1]."""
        return Range(self.low, self.high)

    def state(self) -> dict[str, Tensor]:
        """Return low and high [B, 1]."""
        return {"low": self.low, "high": self.high}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild from state()."""
        return cls(state["low"], state["high"])


class BatchExtremes(Statistics):
    """Extremes of each batch, by its global index, so that rules that depend on order still merge exactly.

    Args:
        first, step: global index of the first batch, and from one batch to the next.
        low, high: [B, T], column t for batch t; (inf, -inf) where it was not seen.
    """

    def __init__(
        self, first: int = 0, step: int = 1, low: Tensor | None = None, high: Tensor | None = None
    ) -> None:
        self.next, self.step = first, step
        self.low = torch.empty(0, 1) if low is None else low
        self.high = torch.empty(0, 1) if high is None else high

    @classmethod
    def start(cls, rank: int = 0, world_size: int = 1) -> Self:
        """Return empty statistics of a process that sees batches rank, rank + world_size, ..."""
        return cls(rank, world_size)

    def update(self, blocks: Tensor) -> None:
        """Take in blocks [B, N] as the next batch."""
        low, high = _extremes(blocks)
        before = (self.next, 0)
        batch = type(self)(low=_pad(low, torch.inf, before), high=_pad(high, -torch.inf, before))
        merged = self.merge(batch)
        self.low, self.high = merged.low, merged.high
        self.next += self.step

    def merge(self, other: Self) -> Self:
        """Return the batches of both; a batch that was split is joined."""
        length = max(self.low.shape[1], other.low.shape[1])
        low, high = self._padded(length), other._padded(length)
        joined = (_join(low[0], high[0], torch.minimum), _join(low[1], high[1], torch.maximum))
        return type(self)(length, 1, *joined)

    def _padded(self, length: int) -> tuple[Tensor, Tensor]:
        after = (0, length - self.low.shape[1])
        return _pad(self.low, torch.inf, after), _pad(self.high, -torch.inf, after)

    def extremes(self) -> Range:
        """Return the least and the largest value of each block over all batches, [B, 1]."""
        return Range(self.low.amin(1, keepdim=True), self.high.amax(1, keepdim=True))

    def state(self) -> dict[str, Tensor]:
        """Return low and high [B, T]."""
        return {"low": self.low, "high": self.high}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild from state(); updates go on after the last batch seen."""
        return cls(state["low"].shape[1], 1, state["low"], state["high"])

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Join statistics of several tensors, which need not have been seen in the same batches."""
        length = max(part.low.shape[1] for part in parts)
        padded = [part._padded(length) for part in parts]
        return cls(length, 1, torch.cat([low for low, _ in padded]), torch.cat([high for _, high in padded]))


def _pad(x: Tensor, value: float, columns: tuple[int, int]) -> Tensor:
    padded: Tensor = F.pad(x, columns, value=value)
    return padded


class Distribution(Statistics):
    """The values of B blocks, as weighted points: what searches over ranges and codebooks read."""

    @abstractmethod
    def points(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, x [b, n], weight [b, n] or [1, 1]) until every block's values were covered."""

    @abstractmethod
    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the magnitude that a fraction of each block's elements do not exceed, [B, 1]."""

    def expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of an elementwise function over each block, [B, 1]."""
        return self._average(lambda x, rows: function(x))

    def mean(self) -> Tensor:
        """Return the mean of each block, [B, 1]."""
        return self._average(lambda x, rows: x)

    def deviation(self, centre: Tensor, order: int = 1) -> Tensor:
        """Return the mean of |x - centre|^order over each block, [B, 1]; centre [B, 1]."""
        return self._average(lambda x, rows: (x - centre[rows]).abs().pow(order))

    def std(self) -> Tensor:
        """Return the standard deviation of each block, [B, 1]."""
        return self.deviation(self.mean(), 2).sqrt()

    def _average(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        low = self.extremes().low
        total, count = torch.zeros(2, *low.shape, dtype=torch.float64, device=low.device)
        for rows, x, weight in self.points():
            total[rows] += (function(x, rows) * weight).sum(1, keepdim=True, dtype=torch.float64)
            count[rows] += weight.expand_as(x).sum(1, keepdim=True, dtype=torch.float64)
        average: Tensor = total / count
        return average.float()

    def squared_error(self, candidates: Range, quantizer: Quantizer[Any], spec: QuantSpec) -> Tensor:
        """Return the sum of (Q(x) - x)^2 for each candidate range [B, R] of each block, [B, R]."""
        num_candidates = candidates.low.shape[1]
        fits = [
            quantizer.fit(self, Range(candidates.low[:, r : r + 1], candidates.high[:, r : r + 1]), spec)
            for r in range(num_candidates)
        ]
        error = torch.zeros(candidates.low.shape, dtype=torch.float64, device=candidates.low.device)
        for rows, x, weight in self.points():
            for r, qparams in enumerate(fits):
                rounded = quantizer.fake_quantize(x, quantizer.rows(qparams, rows), spec)
                error[rows, r] += ((rounded - x).square_() * weight).sum(1)
        return error


class Samples(Distribution):
    """The values themselves: weights, and activations ranged as they pass.

    Args:
        blocks: [B, N], kept as the view it is.
    """

    def __init__(self, blocks: Tensor | None = None) -> None:
        self.blocks = torch.empty(0, 1) if blocks is None else blocks.detach()

    def update(self, blocks: Tensor) -> None:
        """Keep blocks [B, N] too; memory grows with every call."""
        self.blocks = torch.cat([self.blocks, blocks.detach()], 1) if len(self.blocks) else blocks.detach()

    def merge(self, other: Self) -> Self:
        """Return the values of both."""
        result = type(self)(self.blocks)
        result.update(other.blocks)
        return result

    def extremes(self) -> Range:
        """Return the least and the largest value of each block, [B, 1]."""
        return Range(*_extremes(self.blocks))

    def points(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the blocks in float32, a chunk at a time, each value with weight 1."""
        one = torch.ones(1, 1, device=self.blocks.device)
        num_rows = max(1, _CHUNK // max(1, self.blocks.shape[1]))
        for start in range(0, len(self.blocks), num_rows):
            rows = slice(start, start + num_rows)
            for x in torch.split(self.blocks[rows], _CHUNK, dim=1):
                yield rows, x.float(), one

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the least magnitude that at least a fraction of each block's elements do not exceed."""
        size = self.blocks.shape[1]
        rank = min(max(-int(-fraction * size // 1), 1), size)  # ceil
        num_rows = max(1, (_CHUNK * 16) // size)
        parts = torch.split(self.blocks, num_rows)
        return torch.cat([part.float().abs().kthvalue(rank, 1, keepdim=True).values for part in parts])


class Histogram(Distribution):
    """How often each value occurred, on a grid that any order and any partition of the data agree on.

    Every octave [2^e, 2^(e+1)) of |x| is cut into 1024 equal bins, down to 16 octaves below the largest
    magnitude seen; what is nearer to zero is counted as zero. A bin is thus the leading bits of a float32:
    binning is exact, counts are integers, and a larger magnitude only shifts the grid by whole octaves.
    Merged bins give the dyadic grid of width 2^k exactly (see magnitudes), finer where a tail is heavy.

    Args:
        stride: take in every stride-th element only; declared, since it changes what is observed.
    """

    octaves: ClassVar[int] = 16
    octave_bins: ClassVar[int] = 1024  # 10 bits of the mantissa: the largest octave of 2048 linear bins
    half: ClassVar[int] = octaves * octave_bins

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride
        self.ends = Extremes()
        self.octave = torch.empty(0, 1, dtype=torch.int32)  # biased exponent of the largest magnitude, [B, 1]
        self.counts = torch.empty(0, 2 * self.half, dtype=torch.int64)  # [B, bins]; zero's bin at half

    def update(self, blocks: Tensor) -> None:
        """Count blocks [B, N]; extremes are exact whatever the stride."""
        batch = Extremes(*_extremes(blocks))
        self._grow(_octave(batch), len(blocks))
        self.ends = self.ends.merge(batch)
        signed = _maybe(batch.low < 0)
        least, origin, one = self._least(), self._origin(), self.counts.new_ones(1)
        for chunk in torch.split(blocks[:, :: self.stride], max(1, _CHUNK // len(blocks)), dim=1):
            index = _positions(chunk.float(), least, origin, signed).flatten()
            self.counts.view(-1).index_add_(0, index, one.expand(len(index)))

    def _grow(self, octave: Tensor, num_blocks: int) -> None:
        if not len(self.counts):
            self.octave = octave
            self.counts = torch.zeros(num_blocks, 2 * self.half, dtype=torch.int64, device=octave.device)
        elif _maybe(octave > self.octave):
            self.counts = _regrid(self.counts, (octave - self.octave).clamp(min=0))
            self.octave = torch.maximum(self.octave, octave)

    def _least(self) -> Tensor:
        """Leading bits at which the grid begins, [B, 1]."""
        return (self.octave + 1 - self.octaves) * self.octave_bins

    def _origin(self) -> Tensor:
        """Position of zero's bin of each block among all counts, [B, 1]."""
        blocks = torch.arange(len(self.counts), dtype=torch.int32, device=self.counts.device)
        return (blocks * 2 * self.half + self.half).unsqueeze(1)

    def merge(self, other: Self) -> Self:
        """Return the sum of both on the coarser grid."""
        if not self.seen or not other.seen:
            return self.from_state((self if self.seen else other).state())
        theirs = {key: value.to(self.counts.device) for key, value in other.state().items()}
        octave = torch.maximum(self.octave, theirs["octave"])
        counts = _regrid(self.counts, octave - self.octave) + _regrid(
            theirs["counts"], octave - theirs["octave"]
        )
        ends = self.ends.merge(Extremes.from_state(theirs))
        return self.from_state({**ends.state(), "octave": octave, "counts": counts})

    def extremes(self) -> Range:
        """Return the least and the largest value of each block, exact, [B, 1]."""
        return self.ends.extremes()

    def state(self) -> dict[str, Tensor]:
        """Return low, high and octave [B, 1], and counts [B, 2 x 16 x 1024]."""
        return {**self.ends.state(), "octave": self.octave, "counts": self.counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild from state()."""
        result = cls()
        result.ends = Extremes.from_state(state)
        result.octave, result.counts = state["octave"], state["counts"]
        return result

    def points(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield bin centres and counts of the bins that any block of a chunk uses."""
        num_rows = _CHUNK // self.half
        for start in range(0, len(self.counts), num_rows):
            rows = slice(start, start + num_rows)
            counts = self.counts[rows]
            used = counts.any(0).nonzero().squeeze(1)
            yield rows, self._centres(rows)[:, used], counts[:, used].float()

    def _edges(self, rows: slice = slice(None)) -> Tensor:
        """Lower edges of the bins of |x|, and the last one's upper edge, [b, half + 1]."""
        index = torch.arange(self.half + 1, dtype=torch.int32, device=self.counts.device)
        bits = (index + self._least()[rows]) << 13
        bits[:, 0] = 0
        return bits.view(torch.float32)

    def _centres(self, rows: slice) -> Tensor:
        """Bin centres [b, 2 half]; zero stands for its bin."""
        edges = self._edges(rows)
        middle = (edges[:, 1:-1] + edges[:, 2:]) / 2
        zero = torch.zeros_like(middle[:, :1])
        return torch.cat([zero, -middle.flip(1), zero, middle], 1)

    def _magnitude_counts(self) -> Tensor:
        """Counts of |x| on the grid, [B, half]."""
        positive, negative = self.counts[:, self.half :], self.counts[:, 1 : self.half].flip(1)
        return torch.cat([positive[:, :1], positive[:, 1:] + negative], 1)

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the magnitude that a fraction of each block's elements do not exceed, to 2^-11 of itself."""
        cumulative = self._magnitude_counts().cumsum(1).double()
        target = cumulative[:, -1:] * fraction
        index = torch.searchsorted(cumulative, target).clamp(max=self.half - 1)
        below = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0)
        inside = (target - below) / (cumulative.gather(1, index) - below).clamp(min=1)
        edges = self._edges()
        low, high = edges.gather(1, index), edges.gather(1, index + 1)
        largest = torch.maximum(-self.ends.low, self.ends.high)
        return (low + (high - low) * inside.float()).minimum(largest)

    def magnitudes(self, num_bins: int = 2048, least_bins: int = 16) -> tuple[Tensor, Tensor]:
        """Return counts of |x| [B, num_bins] in equal bins, and their width [B, 1], a power of two.

        The bins reach the next power of two above the largest magnitude. Where the 99.9th percentile would
        lie under least_bins of them they are narrower; the last bin then holds everything beyond.
        """
        edges = self._edges()
        wide = edges[:, -1:] / num_bins
        ratio = self.magnitude_quantile(0.999) / (wide * least_bins)
        finest = self.octaves - num_bins.bit_length() + 1  # still a union of bins counted
        shift = torch.where(ratio > 0, -torch.floor(torch.log2(ratio)), 0).clamp(0, finest)
        width = wide / torch.exp2(shift)
        index = (edges[:, :-1] / width).long().clamp(max=num_bins - 1)
        counts = torch.zeros(len(self.counts), num_bins, dtype=torch.int64, device=self.counts.device)
        return counts.scatter_add_(1, index, self._magnitude_counts()), width


def _positions(x: Tensor, least: Tensor, origin: Tensor, signed: bool) -> Tensor:
    """Return where each x [b, n] is counted: its leading bits, less those at which the grid begins."""
    bits = x.view(torch.int32)
    if not signed:
        return (bits >> 13).sub_(least - origin).clamp_(min=origin)
    sign = bits >> 31
    magnitude = (bits & 0x7FFFFFFF).bitwise_right_shift_(13).sub_(least).clamp_(min=0)
    return magnitude.bitwise_xor_(sign).sub_(sign).add_(origin)  # two's complement: negated where sign is -1


def _maybe(condition: Tensor) -> bool:
    """Whether any is true; a GPU is not asked, since the answer would stall it."""
    return condition.device.type != "cpu" or bool(condition.any())


def _octave(ends: Extremes) -> Tensor:
    """Biased float32 exponent of the largest magnitude, [B, 1]; at least the grid's number of octaves."""
    magnitude = torch.maximum(ends.low.abs(), ends.high.abs())
    return (magnitude.view(torch.int32) >> 23).clamp(min=Histogram.octaves)


def _regrid(counts: Tensor, octaves: Tensor) -> Tensor:
    """Shift each block's grid up by octaves [B, 1]; what falls below it counts as zero."""
    half = Histogram.half
    position = torch.arange(2 * half, device=counts.device) - half
    moved = (position.abs() - octaves.long() * Histogram.octave_bins).clamp(min=0) * position.sign()
    return torch.zeros_like(counts).scatter_add_(1, moved + half, counts)

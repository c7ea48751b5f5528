"""Levels that are not evenly spaced: the nearest of them, and their fit to weighted points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.functional import Rounding
from qpipe.statistics import Distribution


def nearest_codes(x: Tensor, levels: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Return the index of the level nearest to each x, a tie going to the lower one.

    Args:
        x: [B, N].
        levels: [B, L] or [1, L], ascending, L > 1.
        rounding: 'stochastic' picks one of the two neighbours, so that the mean is x.

    Returns:
        [B, N], integers in x's dtype.
    """
    if rounding == "nearest":
        return _count_below(midpoints(levels), x).to(x.dtype)
    lower = (_count_below(levels, x) - 1).clamp(0, levels.shape[-1] - 2)
    low, high = take_levels(lower, levels), take_levels(lower + 1, levels)
    fraction = ((x - low) / (high - low)).nan_to_num(0.0)
    return lower + (torch.rand_like(x) < fraction).to(x.dtype)


def take_levels(codes: Tensor, levels: Tensor) -> Tensor:
    """Return the levels [B, L] or [1, L] that codes [B, N] index."""
    if levels.shape[0] == 1:
        return levels[0][codes.long()]
    return levels.gather(-1, codes.long())


def midpoints(levels: Tensor) -> Tensor:
    """Return the thresholds [B, L - 1] between neighbouring levels [B, L]."""
    return (levels[:, 1:] + levels[:, :-1]) / 2


def _count_below(edges: Tensor, x: Tensor) -> Tensor:
    rows = edges[0] if edges.shape[0] == 1 else edges
    return torch.searchsorted(rows.contiguous(), x.contiguous())


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent exactly, in float32, for integers -126 .. 127; 0 for -127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


class Points:
    """Weighted values of B blocks, summed over any intervals in O(log N) by differences of prefix sums.

    Args:
        values: [B, N].
        counts: [B, N], how often each was seen; None: once.
    """

    def __init__(self, values: Tensor, counts: Tensor | None = None) -> None:
        self.values, order = values.double().sort(-1)
        ones = torch.ones_like(self.values)
        self.counts = ones if counts is None else counts.double().expand_as(values).gather(-1, order)
        self._counts = F.pad(self.counts.cumsum(-1), (1, 0))
        self._totals = F.pad((self.counts * self.values).cumsum(-1), (1, 0))

    def cells(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return count and sum, [B, E + 1] each, of the values between ascending edges [B, E]."""
        at = torch.searchsorted(self.values, edges.contiguous(), right=True)
        at = F.pad(F.pad(at, (1, 0)), (0, 1), value=self.values.shape[-1])
        return self._counts.gather(-1, at).diff(), self._totals.gather(-1, at).diff()

    def gain(self, levels: Tensor) -> Tensor:
        """Return by how much rounding to levels [B, L] lowers the sum of squares, [B, 1]."""
        counts, totals = self.cells(midpoints(levels))
        return (2 * levels * totals - levels.square() * counts).sum(-1, keepdim=True)

    def quantiles(self, mass: Tensor, num_levels: int) -> Tensor:
        """Return the values [B, L] at which even shares of mass [B, N] are reached."""
        total = mass.cumsum(-1)
        shares = (torch.arange(num_levels, dtype=total.dtype, device=total.device) + 0.5) / num_levels
        at = torch.searchsorted(total, (total[:, -1:] * shares).contiguous())
        return self.values.gather(-1, at.clamp(max=self.values.shape[-1] - 1))


def fit_blocks(stats: Distribution, fit: Callable[[Points], Tensor]) -> Tensor:
    """Return what fit makes of the values of every block, [B, ...] in float32, some blocks at a time."""
    return torch.cat([fit(points) for points in _by_rows(stats)]).float()


def _by_rows(stats: Distribution) -> Iterator[Points]:
    """Join the pieces in which long blocks come."""
    for _, pieces in groupby(stats.points(), key=lambda piece: piece[0].start):
        _, values, counts = zip(*pieces, strict=True)
        pairs = zip(values, counts, strict=True)
        yield Points(torch.cat(values, 1), torch.cat([count.expand_as(value) for value, count in pairs], 1))


def lloyd_max(points: Points, num_levels: int, max_iterations: int = 100) -> Tensor:
    """Fit levels [B, num_levels], ascending, of least squared error; the best of three starts is kept.

    The starts are evenly spaced levels, those of the density's cube root (Panter and Dite, 1951), and even
    shares of the distinct values.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for Minimum Distortion", 1960.
    """
    low, high = points.values[:, :1], points.values[:, -1:]
    places = (torch.arange(num_levels, dtype=low.dtype, device=low.device) + 0.5) / num_levels
    gaps = F.pad(points.values.diff(), (1, 0))
    starts = (
        low + (high - low) * places,
        points.quantiles(points.counts.pow(1 / 3) * gaps.pow(2 / 3), num_levels),
        points.quantiles((F.pad(gaps[:, 1:], (1, 0), value=1.0) > 0).to(gaps), num_levels),
    )
    fitted = torch.stack([_iterate(points, start, max_iterations) for start in starts])
    gains = torch.stack([points.gain(levels) for levels in fitted])
    return fitted.gather(0, gains.argmax(0, keepdim=True).expand(1, *fitted.shape[1:])).squeeze(0)


def _iterate(points: Points, levels: Tensor, max_iterations: int) -> Tensor:
    for _ in range(max_iterations):
        counts, totals = points.cells(midpoints(levels))
        moved = torch.where(counts > 0, totals / counts.clamp(min=1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def fit_basis(points: Points, basis: Tensor, bits: Tensor, max_iterations: int = 20) -> Tensor:
    """Fit basis [B, K] so that the sums bits @ basis are levels of least squared error, starting from basis.

    Assignment to the nearest sum alternates with the least-squares basis; neither raises the error.

    Args:
        bits: [2^K, K], the coefficients of each code, -1 or 1 (or 0 or 1).

    Source: Zhang et al., "LQ-Nets", 2018, arXiv 1807.10029, algorithm 1 (QEM); Xu et al., "Alternating
    Multi-bit Quantization for Recurrent Neural Networks", 2018, arXiv 1802.00150, section 3.
    """
    bits = bits.to(basis)
    for _ in range(max_iterations):
        levels, order = (basis @ bits.T).sort(-1)
        counts, totals = points.cells(midpoints(levels))
        used = bits[order]  # [B, 2^K, K]
        normal = torch.einsum("bl,blk,blj->bkj", counts, used, used)
        moments = torch.einsum("bl,blk->bk", totals, used)
        moved = (torch.linalg.pinv(normal, hermitian=True) @ moments.unsqueeze(-1)).squeeze(-1)
        if torch.allclose(moved, basis, rtol=1e-12, atol=0):
            break
        basis = moved
    return basis

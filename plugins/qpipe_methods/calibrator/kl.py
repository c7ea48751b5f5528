"""Clip where the quantized distribution tells least apart from the true one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpipe import Calibrator, Histogram, Quantizer, QuantSpec, Range, RecipeError, Role, hookimpl


class KLCalibrator(Calibrator[Histogram]):
    """Search the clip of |x| by relative entropy, all clips of all blocks at once.

    The search sees |x|: after a ReLU all codes lie on one side of zero, so the clip is merged to 2^b levels;
    a two-sided tensor spends half of its codes on each side, 2^(b-1), and is cut at plus and minus the clip,
    or where its values end. Zero is exact whatever the clip, so its bin is given its neighbour's count.

    Args:
        num_bins: equal bins of |x|, a power of two; at least twice the levels.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.
    Equation: argmin_i KL(P_i ‖ Q_i): the first i bins with the tail in the last, and their merger to levels
    """

    name = "kl"
    needs = Histogram
    roles = frozenset({Role.ACTIVATION})
    stand_in: ClassVar[Mapping[Role, str]] = {Role.WEIGHT: "minmax"}
    why_not: ClassVar[Mapping[Role, str]] = {
        Role.WEIGHT: "a block of a weight has too few elements for a histogram"
    }
    dynamic = False

    def __init__(self, num_bins: int = 2048) -> None:
        if num_bins < 8 or num_bins & (num_bins - 1):
            raise RecipeError(f"calibrator 'kl': num_bins must be a power of two from 8, not {num_bins}")
        self.num_bins = num_bins

    def range(self, stats: Histogram, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the extremes, cut at the clip of least divergence."""
        ends = stats.extremes()
        counts, width = stats.magnitudes(self.num_bins)
        counts[:, 0] = counts[:, 1]
        all_positive = (ends.low >= 0) & (not (spec.signed and spec.symmetric))
        one_sided, two_sided = (
            self._clip(counts, 2**spec.num_bits),
            self._clip(counts, 2 ** (spec.num_bits - 1)),
        )
        bins = torch.where(all_positive, one_sided, two_sided)
        return ends.clipped(bins * width)

    def _clip(self, counts: Tensor, num_levels: int) -> Tensor:
        """Return how many bins [B, 1] to keep; all of them where there are no more than levels."""
        if num_levels >= self.num_bins:
            return torch.full((len(counts), 1), self.num_bins, device=counts.device)
        return num_levels + divergence(counts, num_levels).argmin(1, keepdim=True)


def divergence(counts: Tensor, num_levels: int) -> Tensor:
    """Return KL(P || Q) for every clip: the first num_levels, num_levels + 1, ... bins of counts [B, bins].

    P is the clipped histogram, what lies beyond added to its last bin; Q is the clipped histogram without it,
    merged into num_levels runs of bins, each spread evenly over its bins that are not empty. Where the last
    bin is empty but something lies beyond, Q counts one element in it, or the divergence would be infinite.
    With prefix sums of h, [h > 0] and h log h every run and every clip is a difference.

    Returns:
        [B, bins - num_levels + 1], float64.
    """
    bins = counts.shape[1]
    clips = torch.arange(num_levels, bins + 1, device=counts.device)
    runs = torch.arange(num_levels + 1, device=counts.device)
    edges = (runs * clips.unsqueeze(1)) // num_levels  # [R, levels + 1]
    return torch.stack([_divergence(row.double(), clips, edges) for row in counts])


def _divergence(h: Tensor, clips: Tensor, edges: Tensor) -> Tensor:
    """One block: its [R, levels] table stays in cache, which a table of all blocks would not."""
    mass, occupied, entropy = (_prefix(x) for x in (h, (h > 0).double(), torch.xlogy(h, h)))
    total, kept = mass[-1], mass[clips]
    tail, last = total - kept, h[clips - 1]
    in_run, used = _between(mass, edges), _between(occupied, edges)
    level = in_run / used.clamp_(min=1)
    alone = (last == 0) & (tail > 0)  # the tail's bin, which Q counts as one element
    log_level = level.clamp_(min=1e-300).log_()  # 5 times faster than xlogy; an empty run adds 0
    cross = (in_run * log_level).sum(1) + tail * log_level[:, -1].masked_fill(alone, 0)
    own = entropy[clips - 1] + torch.xlogy(last + tail, last + tail)
    return (own - cross + torch.xlogy(total, kept + alone)) / total.clamp(min=1) - torch.xlogy(
        total > 0, total
    )


def _between(prefix: Tensor, edges: Tensor) -> Tensor:
    """Sums of runs; index_select is 3 times faster than indexing."""
    return prefix.index_select(0, edges.flatten()).view(edges.shape).diff(dim=1)


def _prefix(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the KL calibrator."""
    return [KLCalibrator]

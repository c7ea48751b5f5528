"""Contracts that every method keeps: subclass one in a test file and name your object."""

# ruff: noqa: S101  # a contract asserts

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from qpipe.functional import affine_dequantize, affine_qparams, affine_quantize
from qpipe.kinds.calibrator import Calibrator
from qpipe.kinds.granularity import Granularity
from qpipe.kinds.quantizer import Quantizer
from qpipe.statistics import Histogram, Samples, Statistics
from qpipe.types import QParams, QuantSpec, Range, Role

SIGNED = QuantSpec(num_bits=8, symmetric=True, signed=True)
UNSIGNED = QuantSpec(num_bits=8, symmetric=False, signed=False)


def gaussian_blocks(size: int = 1 << 18) -> Tensor:
    """Return one block [1, size] of N(0, 1): its quantiles, in a mixed order, the same on every machine."""
    probabilities = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    values: Tensor = torch.special.ndtri(probabilities)
    return values[order].float().unsqueeze(0)


def laplace_blocks(size: int = 1 << 18) -> Tensor:
    """Return one block [1, size] of a Laplace distribution of scale 1."""
    p = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    values: Tensor = -p.sign() * torch.log1p(-2 * p.abs())
    return values[order].float().unsqueeze(0)


def sample_blocks() -> Tensor:
    """Return blocks [6, 4096]: normal, small, after a ReLU, with outliers, constant, all zero."""
    x = torch.randn(6, 4096, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-3
    x[2].clamp_(min=0)
    x[3, :4] *= 50
    x[4], x[5] = 0.75, 0
    return x


def gaussian_histogram(size: int = 1 << 18) -> Histogram:
    """Return the histogram of gaussian_blocks."""
    return histogram(gaussian_blocks(size))


def histogram(blocks: Tensor) -> Histogram:
    """Return the histogram of blocks [B, N]."""
    result = Histogram()
    result.update(blocks)
    return result


def observe(kind: type[Statistics], blocks: Tensor, batches: int = 4) -> Any:  # noqa: ANN401  # whatever kind is
    """Return statistics of blocks [B, N], seen in so many batches."""
    stats = kind.start()
    for part in torch.tensor_split(blocks, batches, dim=1):
        stats.update(part)
    return stats


def fit(quantizer: Quantizer[Any], blocks: Tensor, spec: QuantSpec) -> QParams:
    """Fit a quantizer to blocks [B, N], over their whole range."""
    stats = Samples(blocks)
    return quantizer.fit(stats, stats.extremes() if quantizer.uses_range else None, spec)


class AffineQuantizer(Quantizer[Statistics]):
    """The plainest levels: what a calibrator is tried with."""

    name = "affine"

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit scale and zero_point."""
        return affine_qparams(stats.extremes() if range is None else range, spec)

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to codes."""
        return affine_quantize(x, qparams, spec)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the real values codes stand for."""
        return affine_dequantize(codes, qparams)

    def is_affine(self, spec: QuantSpec) -> bool:
        """Always."""
        return True


class QuantizerContract:
    """What every quantizer keeps.

    Set quantizer; spec and bits where its codes differ; holds_zero to False where 0 is no level.
    """

    quantizer: ClassVar[Quantizer[Any]]
    spec: ClassVar[QuantSpec] = SIGNED
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    holds_zero: ClassVar[bool] = True

    def rounded(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Return x on the levels fitted to it."""
        return self.quantizer.fake_quantize(x, fit(self.quantizer, x, spec), spec)

    def specs(self) -> list[QuantSpec]:
        """Return spec with each number of bits."""
        return [replace(self.spec, num_bits=num_bits) for num_bits in self.bits]

    def test_codes_are_integers_that_fit_their_bits(self) -> None:
        """Codes are integers from code_min on, and fit code_bits."""
        for spec in self.specs():
            x = sample_blocks()
            codes = self.quantizer.quantize(x, fit(self.quantizer, x, spec), spec) - self.quantizer.code_min(
                spec
            )
            assert torch.equal(codes, codes.round())
            assert codes.min() >= 0
            assert codes.max() < 2 ** self.quantizer.code_bits(spec)

    def test_fake_quantize_is_quantize_then_dequantize(self) -> None:
        """The simulation is what codes stand for."""
        for spec in self.specs():
            x = sample_blocks()
            qparams = fit(self.quantizer, x, spec)
            codes = self.quantizer.quantize(x, qparams, spec)
            torch.testing.assert_close(
                self.quantizer.fake_quantize(x, qparams, spec),
                self.quantizer.dequantize(codes, qparams, spec),
            )

    def test_levels_stay_where_they_are(self) -> None:
        """Quantizing twice is quantizing once."""
        for spec in self.specs():
            x = sample_blocks()
            qparams = fit(self.quantizer, x, spec)
            once = self.quantizer.fake_quantize(x, qparams, spec)
            torch.testing.assert_close(self.quantizer.fake_quantize(once, qparams, spec), once)

    def test_zero_is_exact(self) -> None:
        """Padding and pruned weights stay zero."""
        for spec in self.specs() if self.holds_zero else []:
            x = sample_blocks()
            x[:, ::7] = 0
            assert not self.rounded(x, spec)[:, ::7].any()

    def test_error_falls_as_bits_grow(self) -> None:
        """More bits never cost accuracy."""
        x = sample_blocks()[:3]
        errors = [(self.rounded(x, spec) - x).square().sum(1) for spec in self.specs()]
        for coarse, fine in pairwise(errors):
            assert (fine <= coarse).all()

    def test_degenerate_blocks_survive(self) -> None:
        """Constant and all-zero blocks have finite parameters and results."""
        for spec in self.specs():
            x = sample_blocks()[4:]
            qparams = fit(self.quantizer, x, spec)
            assert (qparams.scale > 0).all()
            assert torch.isfinite(self.rounded(x, spec)).all()

    def test_blocks_are_independent(self) -> None:
        """A block's levels do not depend on its neighbours."""
        x = sample_blocks()
        together = self.rounded(x, self.spec)
        for i in range(len(x)):
            torch.testing.assert_close(self.rounded(x[i : i + 1], self.spec), together[i : i + 1])

    def test_gradient_reaches_the_input(self) -> None:
        """Training sees through the rounding."""
        x = sample_blocks()[:3].requires_grad_()
        qparams = fit(self.quantizer, x.detach(), self.spec)
        (grad,) = torch.autograd.grad(self.quantizer.fake_quantize(x, qparams, self.spec).sum(), x)
        assert torch.isfinite(grad).all()
        assert grad.any()


class CalibratorContract:
    """What every calibrator keeps; set calibrator, and spec where its codes differ."""

    calibrator: ClassVar[Calibrator[Any]]
    quantizer: ClassVar[Quantizer[Any]] = AffineQuantizer()
    spec: ClassVar[QuantSpec] = UNSIGNED

    def ranged(self, blocks: Tensor) -> Range:
        """Return the range of blocks [B, N], seen in four batches."""
        return self.calibrator.range(observe(self.calibrator.needs, blocks), self.quantizer, self.spec)

    def test_range_lies_within_what_was_seen(self) -> None:
        """One low and one high a block, in order, finite, inside the extremes and zero."""
        x = sample_blocks()
        got = self.ranged(x)
        assert got.low.shape == got.high.shape == (len(x), 1)
        assert (got.low <= got.high).all()
        assert (got.low >= x.amin(1, keepdim=True).clamp(max=0)).all()
        assert (got.high <= x.amax(1, keepdim=True).clamp(min=0)).all()

    def test_range_scales_with_the_data(self) -> None:
        """A unit of measure changes nothing."""
        x = sample_blocks()[:4]
        got, larger = self.ranged(x), self.ranged(x * 4)
        torch.testing.assert_close(larger.low, got.low * 4)
        torch.testing.assert_close(larger.high, got.high * 4)

    def test_blocks_are_independent(self) -> None:
        """A block's range does not depend on its neighbours."""
        x = sample_blocks()
        together = self.ranged(x)
        for i in range(len(x)):
            alone = self.ranged(x[i : i + 1])
            torch.testing.assert_close(alone.high, together.high[i : i + 1], rtol=0.01, atol=0)

    def test_processes_agree(self) -> None:
        """Two processes that merge give bit for bit what one gives."""
        kind, batches = self.calibrator.needs, torch.tensor_split(sample_blocks(), 5, dim=1)
        parts = [kind.start(rank, 2) for rank in range(2)]
        whole = kind.start()
        for i, batch in enumerate(batches):
            parts[i % 2].update(batch)
            whole.update(batch)
        merged = kind.from_state(parts[1].state()).merge(kind.from_state(parts[0].state()))
        got = self.calibrator.range(merged, self.quantizer, self.spec)
        want = self.calibrator.range(whole, self.quantizer, self.spec)
        assert torch.equal(got.low, want.low)
        assert torch.equal(got.high, want.high)

    def test_unserved_roles_are_explained(self) -> None:
        """A role that is not served has a stand-in and a reason."""
        for role in set(Role) - self.calibrator.roles:
            assert self.calibrator.stand_in[role]
            assert self.calibrator.why_not[role]


class GranularityContract:
    """What every granularity keeps; set granularity and shapes it can split."""

    granularity: ClassVar[Granularity]
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((8, 6), (8, 4, 3, 3), (8, 1, 3, 3))

    def test_from_blocks_undoes_to_blocks(self) -> None:
        """Every element comes back, bit for bit, in blocks [B, N]."""
        for shape in self.shapes:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self.granularity.check(x.shape, "x")
            blocks = self.granularity.to_blocks(x)
            assert blocks.dim() == 2
            assert torch.equal(self.granularity.from_blocks(blocks, x.shape), x)

    def test_gradient_passes_through_blocks(self) -> None:
        """Each element's gradient is its own."""
        for shape in self.shapes:
            x = torch.ones(shape, requires_grad=True)
            blocks = self.granularity.to_blocks(x)
            (grad,) = torch.autograd.grad(self.granularity.from_blocks(2 * blocks, x.shape).sum(), x)
            assert torch.equal(grad, torch.full(shape, 2.0))

    def test_describes_itself(self) -> None:
        """A user can read how a tensor is split."""
        for shape in self.shapes:
            assert self.granularity.describe(torch.Size(shape))

    def test_unserved_roles_are_explained(self) -> None:
        """A role that is not served has a stand-in and a reason."""
        for role in set(Role) - self.granularity.roles:
            assert self.granularity.stand_in[role]
            assert self.granularity.why_not[role]


class StatisticsContract:
    """What every streaming statistic keeps: merging is observing. Set kind."""

    kind: ClassVar[type[Statistics]]

    def seen(self, blocks: Tensor, rank: int = 0, world_size: int = 1) -> Statistics:
        """Return statistics of the batches of one process; a batch is 256 columns."""
        stats = self.kind.start(rank, world_size)
        for batch in torch.split(blocks, 256, dim=1)[rank::world_size]:
            stats.update(batch)
        return stats

    def test_merging_is_observing(self) -> None:
        """Any number of processes, merged in any order, saw what one would have seen."""
        whole = self.seen(sample_blocks())
        for ranks in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            first, *rest = [self.seen(sample_blocks(), rank, 3) for rank in ranks]
            for other in rest:
                first = first.merge(other)
            assert_same(first, whole)

    def test_state_survives_a_round_trip(self) -> None:
        """What another process or a file gives back is what was sent."""
        stats = self.seen(sample_blocks())
        assert_same(self.kind.from_state(stats.state()), stats)

    def test_nothing_seen_merges_as_nothing(self) -> None:
        """A process without data changes nothing."""
        stats = self.seen(sample_blocks())
        assert not self.kind.start().seen
        assert_same(stats.merge(self.kind.start()), stats)
        assert_same(self.kind.start().merge(stats), stats)

    def test_stacking_joins_blocks(self) -> None:
        """Statistics of several tensors stack to those of all their blocks."""
        x = sample_blocks()
        assert_same(self.kind.stack([self.seen(x[:1]), self.seen(x[1:])]), self.seen(x))

    def test_extremes_are_exact(self) -> None:
        """Extremes are those of the data."""
        got = self.seen(sample_blocks()).extremes()
        assert torch.equal(got.low, sample_blocks().amin(1, keepdim=True))
        assert torch.equal(got.high, sample_blocks().amax(1, keepdim=True))

    def test_nan_and_infinity_are_noticed(self) -> None:
        """A value that is no number is never lost."""
        for value in (torch.nan, torch.inf, -torch.inf):
            x = sample_blocks()
            x[1, 300] = value
            assert not self.seen(x).is_finite()
        assert self.seen(sample_blocks()).is_finite()


def assert_same(a: Statistics, b: Statistics) -> None:
    """Assert that two statistics hold the same numbers, bit for bit."""
    mine, theirs = a.state(), b.state()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key

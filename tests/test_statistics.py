from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe_methods.calibrator.kl import KLCalibrator
from qpipe_methods.calibrator.moving_average import MovingAverageCalibrator
from qpipe_methods.calibrator.mse import MSECalibrator
from qpipe_methods.calibrator.percentile import PercentileCalibrator
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import Tensor, distributed

from qpipe import BatchExtremes, Extremes, Histogram, QuantSpec, Samples
from qpipe.statistics import Statistics
from qpipe.testing import (
    StatisticsContract,
    assert_same,
    gaussian_blocks,
    gaussian_histogram,
    histogram,
    sample_blocks,
)


class TestExtremes(StatisticsContract):
    kind = Extremes


class TestBatchExtremes(StatisticsContract):
    kind = BatchExtremes

    def test_keeps_batches_in_their_global_order(self) -> None:
        stats = BatchExtremes.start(rank=1, world_size=3)
        stats.update(torch.tensor([[1.0, 2.0]]))
        stats.update(torch.tensor([[5.0, 3.0]]))
        assert stats.high.tolist() == [[-torch.inf, 2, -torch.inf, -torch.inf, 5]]
        assert stats.low.tolist() == [[torch.inf, 1, torch.inf, torch.inf, 3]]

    def test_stacks_tensors_that_were_seen_in_different_batches(self) -> None:
        often, once = BatchExtremes(), BatchExtremes()
        for value in (1.0, 2.0):
            often.update(torch.full((1, 2), value))
        once.update(torch.zeros(1, 2))
        assert BatchExtremes.stack([often, once]).extremes().high.tolist() == [[2], [0]]


class TestHistogram(StatisticsContract):
    kind = Histogram

    def test_counts_the_dyadic_grid_exactly(self) -> None:
        """Merged bins are floor(|x| / 2^k), counted one by one."""
        x = sample_blocks()[:4]
        for num_bins in (1024, 2048):
            counts, width = histogram(x).magnitudes(num_bins)
            assert torch.equal(torch.frexp(width).mantissa, torch.full_like(width, 0.5))
            for row, step, got in zip(x, width, counts, strict=True):
                want = torch.bincount((row.abs() / step).long().clamp(max=num_bins - 1), minlength=num_bins)
                assert torch.equal(got, want)

    def test_bins_reach_the_next_power_of_two(self) -> None:
        counts, width = histogram(torch.tensor([[0.1, 3.0, -5.0]])).magnitudes(2048)
        assert width.item() == 8 / 2048
        assert counts[0, int(5 / width)] == 1

    def test_an_outlier_does_not_cost_the_others_their_resolution(self) -> None:
        """One value of 3,000 would make a dyadic bin 2 sigmas wide."""
        x = torch.cat([gaussian_blocks(), torch.full((1, 1), 3000.0)], 1)
        counts, width = histogram(x).magnitudes(2048)
        assert 16 <= 3.29 / width.item() < 64
        assert counts[0, -1] == 1
        assert histogram(x).magnitude_quantile(0.999).item() == pytest.approx(3.2905, rel=2e-3)
        assert histogram(x).expectation(lambda v: v.clamp(-4, 4).square()).item() == pytest.approx(
            1, rel=2e-3
        )

    def test_negative_zero_is_zero(self) -> None:
        a, b = histogram(torch.tensor([[-0.0, 1.0]])), histogram(torch.tensor([[0.0, 1.0]]))
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(histogram(torch.tensor([[-0.0, -1.0]])).counts.sum(1), torch.tensor([2]))

    def test_half_precision_is_counted_exactly(self) -> None:
        x = gaussian_blocks(1 << 12)
        for dtype in (torch.float16, torch.bfloat16):
            assert_same(histogram(x.to(dtype)), histogram(x.to(dtype).float()))

    def test_layout_does_not_matter(self) -> None:
        x = sample_blocks()
        assert_same(histogram(x), histogram(x.t().contiguous().t()))

    def test_a_stride_takes_every_nth_element(self) -> None:
        x = sample_blocks()
        strided = Histogram(stride=4)
        strided.update(x)
        assert strided.counts.sum(1).tolist() == [1024] * len(x)
        assert torch.equal(strided.extremes().high, x.amax(1, keepdim=True))

    def test_size_does_not_grow_with_batches(self) -> None:
        once, often = histogram(sample_blocks()), Histogram()
        for _ in range(5):
            often.update(sample_blocks())
        assert {k: v.shape for k, v in often.state().items()} == {k: v.shape for k, v in once.state().items()}
        assert torch.equal(often.counts, 5 * once.counts)

    def test_moments_are_those_of_the_samples(self) -> None:
        x = sample_blocks()
        seen, exact = histogram(x), Samples(x)
        torch.testing.assert_close(seen.std(), exact.std(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(exact.std(), x.std(1, correction=0, keepdim=True), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.mean(), exact.mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(exact.mean(), x.mean(1, keepdim=True), rtol=1e-4, atol=1e-6)
        zero = torch.zeros(len(x), 1)
        torch.testing.assert_close(seen.deviation(zero), x.abs().mean(1, keepdim=True), rtol=1e-3, atol=1e-6)

    def test_squared_error_is_that_of_the_samples(self) -> None:
        x, quantizer = sample_blocks()[:4], UniformQuantizer()
        for spec in (QuantSpec(4), QuantSpec(8, False, False)):
            tried = Samples(x).extremes().shrunk(torch.tensor([0.2, 0.6, 1.0]))
            seen = histogram(x).squared_error(tried, quantizer, spec)
            exact = Samples(x).squared_error(tried, quantizer, spec)
            torch.testing.assert_close(seen, exact, rtol=0.05, atol=1e-9)
            scale = quantizer.fit(Samples(x), tried, spec).scale  # all candidates at once
            assert scale.shape == (4, 3)


class TestSamples:
    def test_quantile_is_the_order_statistic(self) -> None:
        x = sample_blocks()
        got = Samples(x).magnitude_quantile(0.75)
        assert torch.equal(got, x.abs().sort(1).values[:, 3071:3072])

    def test_chunks_cover_every_element_once(self) -> None:
        for shape in ((1, 200_000), (7, 30_000), (300, 1000), (5, 3)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            seen = torch.zeros(shape[0], dtype=torch.int64)
            for rows, part, weight in Samples(x).points():
                seen[rows] += part.shape[1]
                assert weight.item() == 1
            assert (seen == shape[1]).all()

    def test_merging_is_observing(self) -> None:
        a, b = sample_blocks()[:, :100], sample_blocks()[:, 100:]
        merged = Samples(a).merge(Samples(b))
        assert torch.equal(merged.blocks, sample_blocks())
        assert merged.seen
        assert not Samples().seen

    def test_is_a_view(self) -> None:
        x = sample_blocks()
        assert Samples(x).blocks.data_ptr() == x.data_ptr()


exponents = st.floats(-30, 30, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.lists(exponents, min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 599), max_size=5),
    order=st.randoms(use_true_random=False),
    kind=st.sampled_from([Extremes, Histogram]),
)
def test_any_order_and_any_partition_give_the_same_integers(
    seed: int, exponent: list[float], cuts: list[int], order: object, kind: type[Statistics]
) -> None:
    """Values over 60 octaves, cut anywhere, in any order, merged in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 600, generator=generator)
    x *= torch.tensor([2.0**e for e in exponent])[torch.randint(len(exponent), (600,), generator=generator)]
    whole = kind.start()
    whole.update(x)
    shuffled = x[:, torch.randperm(600, generator=generator)]
    parts = []
    for piece in torch.tensor_split(shuffled, sorted(cuts), dim=1):
        if piece.shape[1]:
            stats = kind.start()
            stats.update(piece)
            parts.append(stats)
    order.shuffle(parts)  # type: ignore[attr-defined]
    while len(parts) > 1:
        parts.append(parts.pop(0).merge(parts.pop(0)))
    assert_same(parts[0], whole)


def test_updates_are_merges() -> None:
    x = sample_blocks() * torch.logspace(-3, 3, 4096)
    assert_same(histogram(x), TestHistogram().seen(x))
    assert_same(histogram(x), TestHistogram().seen(x.flip(1)))


KINDS = {
    "moving_average": MovingAverageCalibrator(0.1),
    "percentile": PercentileCalibrator(99.0),
    "kl": KLCalibrator(),
    "mse": MSECalibrator(),
}


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(3, 5000, generator=generator) * 2.0**i for i in (0, -3, 2, 1, 4)]


def _observed(rank: int, world_size: int) -> dict[str, Statistics]:
    seen = {name: calibrator.needs.start(rank, world_size) for name, calibrator in KINDS.items()}
    for batch in _batches()[rank::world_size]:
        for stats in seen.values():
            stats.update(batch)
    return seen


def _fitted(seen: dict[str, Statistics]) -> dict[str, Tensor]:
    spec, quantizer = QuantSpec(8, symmetric=False, signed=False), UniformQuantizer()
    result = {}
    for name, stats in seen.items():
        qparams = quantizer.fit(stats, KINDS[name].range(stats, quantizer, spec), spec)
        result |= {f"{name}.scale": qparams.scale, f"{name}.zero_point": qparams.zero_point}
        result |= {f"{name}.{key}": value for key, value in stats.state().items()}
    return result


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    local = _observed(rank, 2)
    gathered: list[dict[str, dict[str, Tensor]]] = [{}, {}]
    distributed.all_gather_object(gathered, {name: stats.state() for name, stats in local.items()})
    merged = {}
    for name, stats in local.items():
        first, second = (type(stats).from_state(states[name]) for states in gathered)
        merged[name] = first.merge(second)
    torch.save(_fitted(merged), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_gloo_ranks_are_one_process(tmp_path: Path) -> None:
    """Statistics and parameters, bit for bit."""
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)
    want = _fitted(_observed(0, 1))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert torch.equal(got[key], value), key


def test_gaussian_histogram_is_a_gaussian() -> None:
    stats = gaussian_histogram()
    assert stats.std().item() == pytest.approx(1, abs=1e-3)
    assert stats.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_counts_as_a_cpu_does() -> None:
    x = sample_blocks()
    on_gpu = TestHistogram().seen(x.cuda())
    for key, value in TestHistogram().seen(x).state().items():
        assert torch.equal(on_gpu.state()[key].cpu(), value)

"""Fitted levels against Max's table and the identities of a centroid."""

from __future__ import annotations

import itertools

import pytest
import torch
from qpipe_methods.quantizer.codebook import CodebookQuantizer
from torch import Tensor

from qpipe import Histogram, QuantSpec, RecipeError, Samples
from qpipe.levels import Points, lloyd_max
from qpipe.testing import QuantizerContract


class TestCodebook(QuantizerContract):
    quantizer = CodebookQuantizer()
    holds_zero = False


def gaussian(size: int = 200_001) -> Tensor:
    """Return the quantiles of a standard normal, [1, size]."""
    return torch.special.ndtri((torch.arange(size) + 0.5).double() / size).float().unsqueeze(0)


@pytest.mark.parametrize(
    ("num_bits", "positive", "mse"),
    [
        (1, [0.79788], 0.36338),
        (2, [0.45278, 1.51042], 0.117482),
        (3, [0.24509, 0.75601, 1.34391, 2.15195], 0.0345478),
        (4, [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.00950101),
    ],
)
def test_gaussian_levels_are_those_of_max(num_bits: int, positive: list[float], mse: float) -> None:
    """Lloyd-Max levels and error of N(0, 1) (Max 1960; METHODS B)."""
    spec, quantizer = QuantSpec(num_bits=num_bits), CodebookQuantizer(1000)
    qparams = quantizer.fit(Samples(gaussian()), None, spec)
    expected = torch.tensor([*(-level for level in reversed(positive)), *positive])
    torch.testing.assert_close(qparams.extra["levels"][0], expected, rtol=0, atol=1.5e-3)
    error = quantizer.fake_quantize(gaussian(), qparams, spec) - gaussian()
    assert error.double().square().mean().item() == pytest.approx(mse, rel=1e-3)


def test_a_histogram_gives_the_levels_of_its_samples() -> None:
    spec, quantizer = QuantSpec(num_bits=3), CodebookQuantizer(1000)
    histogram = Histogram()
    for part in gaussian().chunk(3, dim=1):
        histogram.update(part)
    levels = quantizer.fit(histogram, None, spec).extra["levels"][0]
    expected = torch.tensor([0.24509, 0.75601, 1.34391, 2.15195])
    torch.testing.assert_close(levels[4:], expected, rtol=0, atol=4e-3)  # bins are 2^-10 wide there


def test_centroids_keep_the_mean_and_are_orthogonal_to_the_error() -> None:
    """E[Q] = E[x], E[(x - Q) Q] = 0, MSE = E[x²] - E[Q²], block by block."""
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)).exp()
    spec, quantizer = QuantSpec(num_bits=3), CodebookQuantizer(1000)
    value = quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec).double()
    x = x.double()
    torch.testing.assert_close(value.mean(1), x.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(((x - value) * value).mean(1), torch.zeros(5).double(), rtol=0, atol=1e-4)
    energy = x.square().mean(1) - value.square().mean(1)
    torch.testing.assert_close((x - value).square().mean(1), energy, rtol=1e-4, atol=0)


def test_two_levels_of_a_few_points_are_the_best_split() -> None:
    """Brute force over all splits of the sorted points."""
    x = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    spec, quantizer = QuantSpec(num_bits=1), CodebookQuantizer()
    value = quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec)
    error = (value - x).square().sum(1)
    ordered = x.sort(1).values
    splits = [
        sum(part.var(1, unbiased=False) * part.shape[1] for part in (ordered[:, :k], ordered[:, k:]))
        for k in range(1, 9)
    ]
    best = torch.stack(splits, 1).amin(1)
    assert (error <= best * 1.35 + 1e-6).all()  # Lloyd's algorithm ends in a local optimum
    assert (error <= best + 1e-6).float().mean() >= 0.6


def test_as_many_levels_as_values_leave_no_error() -> None:
    x = torch.tensor(list(itertools.islice(itertools.cycle([-3.0, 0.0, 0.5, 8.0]), 100))).unsqueeze(0)
    spec, quantizer = QuantSpec(num_bits=2), CodebookQuantizer()
    assert torch.equal(quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec), x)


def test_a_constant_block_and_a_dead_one_survive() -> None:
    x = torch.tensor([[2.5], [0.0]]).expand(2, 50)
    spec, quantizer = QuantSpec(num_bits=4), CodebookQuantizer()
    assert torch.equal(quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec), x)


def test_large_tables_are_refused() -> None:
    with pytest.raises(RecipeError, match="1 to 8"):
        CodebookQuantizer().check(QuantSpec(num_bits=9))


def test_the_gradient_passes_between_the_outer_levels() -> None:
    quantizer, spec = CodebookQuantizer(), QuantSpec(num_bits=2)
    qparams = quantizer.fit(Samples(torch.tensor([[-1.0, -0.5, 0.5, 1.0]])), None, spec)
    x = torch.tensor([[-2.0, -0.8, 0.7, 1.5]], requires_grad=True)
    quantizer.fake_quantize(x, qparams, spec).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]


def test_lloyd_starts_where_panter_and_dite_put_many_levels() -> None:
    """The density's cube root: of N(0, 1) it is N(0, 3), here as far as the values reach."""
    x = gaussian().double()
    grid = torch.linspace(-x.max().item(), x.max().item(), x.shape[1]).double().unsqueeze(0)
    counts = torch.exp(-grid.square() / 2)  # the same density, even values seen unevenly often
    starts, counted = (lloyd_max(points, 32, 0)[0] for points in (Points(x), Points(grid, counts)))
    beyond = torch.special.ndtr(-x.max() / 3**0.5)
    shares = beyond + (1 - 2 * beyond) * (torch.arange(32).double() + 0.5) / 32
    expected = 3**0.5 * torch.special.ndtri(shares)
    torch.testing.assert_close(counted.double(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(starts.double(), expected, rtol=0, atol=0.02)

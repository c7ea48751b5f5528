"""Half-quadratic quantization: its alternation by hand, its error, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.quantizer.hqq import HQQQuantizer

from qpipe import QParams, QuantSpec, RecipeError, Role, Samples
from qpipe.testing import QuantizerContract

SPEC = QuantSpec(num_bits=3, symmetric=False, signed=False, role=Role.WEIGHT)


class TestHQQ(QuantizerContract):
    quantizer = HQQQuantizer()
    spec = SPEC
    holds_zero = False


def block(seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = (torch.randn(64, generator=generator) + 0.3).tolist()
    return [*values, 4.5]


def alternated(x: list[float], p: float, beta: float, kappa: float, steps: int) -> float:
    """Return the zero that the published alternation finds for one block, number by number."""
    scale = 7 / (max(x) - min(x))  # codes per unit, as published
    zero = -min(x) * scale
    best, least = zero, float("inf")
    for _ in range(steps):
        codes = [min(max(round(v * scale + zero), 0), 7) for v in x]
        errors = [v - (c - zero) / scale for v, c in zip(x, codes, strict=True)]
        size = sum(map(abs, errors)) / len(x)
        if size >= least:
            break
        best, least = zero, size
        kept = [
            (1 if e > 0 else -1) * max(abs(e) - abs(e) ** (p - 1) / beta, 0) if e else 0.0 for e in errors
        ]
        zero = sum(c - (v - k) * scale for c, v, k in zip(codes, x, kept, strict=True)) / len(x)
        beta *= kappa
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_zero_is_that_of_the_alternation(seed: int) -> None:
    x = block(seed)
    stats = Samples(torch.tensor([x]))
    zero = HQQQuantizer().fit(stats, None, SPEC).extra["zero"].item()
    assert zero == pytest.approx(alternated(x, 0.7, 10, 1.01, 20), rel=1e-4)
    other = HQQQuantizer(p=0.5, beta=1, kappa=1.1).fit(stats, None, SPEC).extra["zero"].item()
    assert other == pytest.approx(alternated(x, 0.5, 1, 1.1, 20), rel=1e-4)


def test_no_block_errs_more_than_with_the_zero_of_its_range() -> None:
    x = torch.tensor([block(seed) for seed in range(20)])
    quantizer, stats = HQQQuantizer(), Samples(x)
    fitted = quantizer.fit(stats, MinMaxCalibrator().range(stats, quantizer, SPEC), SPEC)
    start = QParams(fitted.scale, fitted.zero_point, {"zero": -x.amin(1, keepdim=True) / fitted.scale})
    errors = [(quantizer.fake_quantize(x, q, SPEC) - x).abs().mean(1) for q in (fitted, start)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()


def test_codes_without_a_movable_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"set weight\.symmetric=false weight\.signed=false"):
        HQQQuantizer().check(QuantSpec(num_bits=4, role=Role.WEIGHT))
    with pytest.raises(ValueError, match="p is above 0"):
        HQQQuantizer(p=0)


def test_the_gradient_passes_between_the_outer_levels() -> None:
    """Levels -1.25 to 5.75 at a zero of 1.25 and a scale of 1."""
    qparams = QParams(torch.ones(1, 1), torch.zeros(1, 1), {"zero": torch.tensor([[1.25]])})
    x = torch.tensor([[-1.3, -1.2, 5.7, 5.8]], requires_grad=True)
    HQQQuantizer().fake_quantize(x, qparams, SPEC).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]

"""Three levels: the paper's threshold and the true optimum, on a Gaussian and by brute force."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.ternary import TernaryQuantizer

from qpipe import QuantSpec, RecipeError, Samples
from qpipe.testing import QuantizerContract

SPEC = QuantSpec(num_bits=2)


class TestTernary(QuantizerContract):
    quantizer = TernaryQuantizer()
    spec = QuantSpec(num_bits=2)
    bits = (2,)


class TestTernaryExact(TestTernary):
    quantizer = TernaryQuantizer(exact=True)


@pytest.mark.parametrize(
    ("exact", "threshold", "scale", "mse"),
    [(False, 0.55852, 1.18416, 0.191625), (True, 0.61200, 1.22401, 0.190174)],
)
def test_gaussian_threshold_scale_and_error(exact: bool, threshold: float, scale: float, mse: float) -> None:
    """The 0.7 E|w| rule and the 3-level optimum of N(0, 1) (METHODS B, D)."""
    x = torch.special.ndtri((torch.arange(200_001) + 0.5).double() / 200_001).float().unsqueeze(0)
    quantizer = TernaryQuantizer(exact)
    qparams = quantizer.fit(Samples(x), None, SPEC)
    assert qparams.extra["threshold"].item() == pytest.approx(threshold, abs=1e-3)
    assert qparams.scale.item() == pytest.approx(scale, abs=1e-3)
    error = (quantizer.fake_quantize(x, qparams, SPEC) - x).double().square().mean().item()
    assert error == pytest.approx(mse, rel=2e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_the_error_is_the_energy_less_what_is_kept(exact: bool) -> None:
    """||W - Q||² = ||W||² - (Σ_I |w|)² / |I|, I the kept weights (METHODS D)."""
    x = torch.randn(6, 501, generator=torch.Generator().manual_seed(0)).double() ** 3
    quantizer = TernaryQuantizer(exact)
    qparams = quantizer.fit(Samples(x.float()), None, SPEC)
    value = quantizer.fake_quantize(x.float(), qparams, SPEC).double()
    kept = value != 0
    expected = x.square().sum(1) - (x.abs() * kept).sum(1).square() / kept.sum(1)
    torch.testing.assert_close((value - x).square().sum(1), expected, rtol=1e-5, atol=0)


def test_exact_is_the_best_of_all_thresholds() -> None:
    """Brute force over every subset of the largest magnitudes."""
    x = torch.randn(8, 25, generator=torch.Generator().manual_seed(2))
    quantizer = TernaryQuantizer(exact=True)
    value = quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, SPEC), SPEC)
    ordered = x.abs().sort(1, descending=True).values
    gains = [ordered[:, :k].sum(1).square() / k for k in range(1, 26)]
    best = x.square().sum(1) - torch.stack(gains, 1).amax(1)
    torch.testing.assert_close((value - x).square().sum(1), best, rtol=1e-4, atol=1e-5)


def test_codes_and_their_width() -> None:
    x = torch.tensor([[-2.0, -0.1, 0.0, 0.1, 2.0]])
    quantizer = TernaryQuantizer()
    assert quantizer.quantize(x, quantizer.fit(Samples(x), None, SPEC), SPEC).tolist() == [[-1, 0, 0, 0, 1]]
    assert (quantizer.code_min(SPEC), quantizer.code_bits(SPEC)) == (-1, 2)
    with pytest.raises(RecipeError, match="num_bits=2"):
        quantizer.check(QuantSpec(num_bits=4))

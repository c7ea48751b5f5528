"""Codewords of several weights: against scikit-learn, the scalar optimum and counted bits."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.vector import VectorQuantizer, k_means
from sklearn.cluster import KMeans

from qpipe import QuantSpec, RecipeError, Role, Samples
from qpipe.nn import FakeQuant, add_weight_quantizer
from qpipe.packing import payload_bytes
from qpipe.recipe import Slot
from qpipe.testing import QuantizerContract


class TestVector(QuantizerContract):
    quantizer = VectorQuantizer(max_iterations=10, starts=1)
    spec = QuantSpec(num_bits=4, role=Role.WEIGHT)
    bits = (2, 4, 6)
    holds_zero = False


def rounded(x: torch.Tensor, dim: int, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    quantizer, spec = VectorQuantizer(dim), QuantSpec(num_bits=num_bits, role=Role.WEIGHT)
    qparams = quantizer.fit(Samples(x), None, spec)
    return quantizer.fake_quantize(x, qparams, spec), qparams.extra["codebook"]


def test_one_dimension_is_scalar_k_means() -> None:
    """Four levels of a Gaussian: MSE 0.11748, levels ±0.4528 and ±1.5104 (Max, 1960)."""
    x = torch.special.ndtri((torch.arange(20_001) + 0.5) / 20_001).unsqueeze(0)
    y, codebook = rounded(x, 1, 2)
    assert (y - x).square().mean().item() == pytest.approx(0.11748, rel=3e-3)
    assert codebook.flatten().sort().values.tolist() == pytest.approx([-1.51, -0.453, 0.453, 1.51], abs=0.02)


def test_codewords_rest_where_scikit_learns_do() -> None:
    x = torch.randn(1, 2 * 600, generator=torch.Generator().manual_seed(0))
    y, codebook = rounded(x, 2, 3)
    vectors = x.view(-1, 2).numpy()
    error = (y - x).square().sum().item()
    same_start = KMeans(8, init=codebook[0].numpy(), n_init=1, tol=0).fit(vectors)
    assert same_start.inertia_ == pytest.approx(error, rel=1e-4)
    assert error <= 1.05 * KMeans(8, n_init=10, random_state=0).fit(vectors).inertia_


def test_as_many_codewords_as_distinct_vectors_leave_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, 16, 4, generator=generator)
    index = torch.randint(16, (3, 200), generator=generator)
    x = torch.stack([few[i][index[i]].flatten() for i in range(3)])
    y, _ = rounded(x, 4, 4)
    torch.testing.assert_close(y, x)


def test_a_code_serves_dim_weights() -> None:
    """N num_bits / dim bits of codes, and 2^num_bits codewords of dim float32."""
    layer = torch.nn.Linear(64, 32, bias=False)
    quantizer, spec = VectorQuantizer(8), QuantSpec(num_bits=6, role=Role.WEIGHT)
    fake_quant = FakeQuant(Slot(quantizer, MinMaxCalibrator(), PerLayer(), spec), "weight")
    blocks = PerLayer().to_blocks(layer.weight.detach())
    fake_quant.set_qparams(quantizer.fit(Samples(blocks), None, spec))
    assert fake_quant.codes(layer.weight.detach()).shape == (1, 64 * 32 // 8)
    add_weight_quantizer(layer, "weight", fake_quant)
    codes, codebook, scale = 64 * 32 * 6 // 8 // 8, 64 * 8 * 4, 4
    assert payload_bytes(layer) == codes + codebook + scale


def test_blocks_that_do_not_split_are_refused() -> None:
    with pytest.raises(RecipeError, match="9 weights does not split into vectors of 4"):
        rounded(torch.randn(2, 9), 4, 2)


def test_more_than_eight_bits_are_refused() -> None:
    with pytest.raises(RecipeError, match="1 to 8"):
        VectorQuantizer().check(QuantSpec(num_bits=9, role=Role.WEIGHT))


def test_the_start_of_least_squared_error_is_kept() -> None:
    """Block by block, against the four starts fitted one by one and measured here."""
    x = torch.randn(60, 2 * 30, generator=torch.Generator().manual_seed(1))
    quantizer, spec = VectorQuantizer(2), QuantSpec(num_bits=2, role=Role.WEIGHT)
    value = quantizer.fake_quantize(x, quantizer.fit(Samples(x), None, spec), spec)
    vectors = x.view(60, 30, 2).double()
    books = [k_means(vectors, 4, 50, seed) for seed in range(4)]
    errors = [torch.cdist(vectors, book).amin(-1).square().sum(1) for book in books]
    least = torch.stack(errors).amin(0)
    torch.testing.assert_close((value - x).double().square().sum(1), least, rtol=1e-5, atol=0)

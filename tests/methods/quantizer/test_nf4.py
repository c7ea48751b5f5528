"""NormalFloat: QLoRA's table, its error on normal blocks, and the size of doubly quantized scales."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.quantizer.nf4 import NF4Quantizer, nf4_levels

from qpipe import QuantSpec, RecipeError, Role, Samples
from qpipe.testing import QuantizerContract

SPEC = QuantSpec(num_bits=4, symmetric=True, role=Role.WEIGHT)
TABLE = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]  # fmt: skip


class TestNF4(QuantizerContract):
    quantizer = NF4Quantizer()
    spec = SPEC
    bits = (4,)


def test_levels_are_those_of_qlora() -> None:
    """The published table, to 2e-7 (METHODS B)."""
    expected = torch.tensor(TABLE, dtype=torch.float64)
    torch.testing.assert_close(nf4_levels(), expected, rtol=0, atol=2e-7)


def test_codes_are_the_nearest_levels() -> None:
    x = torch.linspace(-1, 1, 5001).unsqueeze(0)
    qparams = NF4Quantizer().fit(Samples(x), None, SPEC)
    expected = (x.squeeze(0).unsqueeze(1).double() - torch.tensor(TABLE).double()).abs().argmin(1)
    codes = NF4Quantizer().quantize(x, qparams, SPEC)[0].long()
    assert (codes == expected).float().mean() > 0.999  # midpoints differ in the last bit
    assert codes.unique().tolist() == [*range(16)]


def test_error_of_normal_blocks_of_64() -> None:
    """N(0, 1) in blocks of 64: MSE 0.00846, against 0.01158 for INT4 (METHODS B, Monte Carlo)."""
    x = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    qparams = NF4Quantizer().fit(Samples(x), None, SPEC)
    error = (NF4Quantizer().fake_quantize(x, qparams, SPEC) - x).square().mean().item()
    assert error == pytest.approx(0.00846, abs=6e-5)


def test_double_quantization_takes_a_byte_a_block_and_costs_little() -> None:
    """8/64 + 32/(64 · 256) bits a weight for scales, within 2 % of the plain error (QLoRA, section 3)."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for double in (False, True):
        quantizer = NF4Quantizer(double_quantization=double)
        qparams = quantizer.fit(Samples(x), None, SPEC)
        errors.append((quantizer.fake_quantize(x, qparams, SPEC) - x).square().mean().item())
    stored = [qparams.scale, *qparams.extra.values()]
    assert sum(tensor.nbytes for tensor in stored) == 1000 + 4 * 4 + 4  # blocks, groups of 256, the mean
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    scales = quantizer.scales(qparams)
    largest = x.abs().amax(1, keepdim=True)
    # E4M3 keeps 3 bits of the distance from the mean
    assert ((scales - largest).abs() <= (largest - largest.mean()).abs() / 16 + 1e-4).all()


def test_scales_work_a_chunk_at_a_time() -> None:
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    quantizer = NF4Quantizer(double_quantization=True)
    qparams = quantizer.fit(Samples(x), None, SPEC)
    part = quantizer.rows(qparams, slice(250, 270))
    whole = quantizer.fake_quantize(x, qparams, SPEC)
    assert torch.equal(quantizer.fake_quantize(x[250:270], part, SPEC), whole[250:270])


def test_other_widths_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"weight\.num_bits=4"):
        NF4Quantizer().check(QuantSpec(num_bits=8, role=Role.WEIGHT))


def test_the_gradient_passes_between_the_outer_levels() -> None:
    quantizer, spec = NF4Quantizer(), QuantSpec(num_bits=4, role=Role.WEIGHT)
    qparams = quantizer.fit(Samples(torch.tensor([[-2.0, 0.5, 1.0, 2.0]])), None, spec)
    x = torch.tensor([[-3.0, -1.9, 1.9, 3.0]], requires_grad=True)
    quantizer.fake_quantize(x, qparams, spec).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]


def test_the_largest_distance_from_the_mean_takes_the_largest_byte() -> None:
    """Each 256 scales are divided so that the farthest is ±448, E4M3's largest."""
    x = torch.rand(512, 4, generator=torch.Generator().manual_seed(0))
    stored = NF4Quantizer(double_quantization=True).fit(Samples(x), None, SPEC).scale
    largest = stored.view(torch.float8_e4m3fn).float().view(2, 256).abs().amax(1)
    assert largest.tolist() == [448, 448]

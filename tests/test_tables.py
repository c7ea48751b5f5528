"""Codes looked up in tables stand for what their quantizer says; the tables are as small as can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Role, Slot, convert, quantize
from qpipe.nn import FakeQuant
from qpipe.tables import TabledWeight

GROUPS = {"name": "subchannel", "group_size": 64}
BLOCKS = 64 * 256 // 64


def table(quantizer: Any, granularity: Any = GROUPS, **weight: Any) -> tuple[TabledWeight, Tensor]:  # noqa: ANN401
    """Return the stored weight of a linear layer [64, 256], and the weight the simulation computes with."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 64)), torch.randn(2, 256)
    chosen = {"quantizer": quantizer, "granularity": granularity, "restricted": False, **weight}
    simulation, _ = quantize(model, [x], weight=chosen, activation=None, transform=[], evaluator=[])
    [stored] = [m for m in convert(simulation, tables=True).modules() if isinstance(m, TabledWeight)]
    return stored, simulation[0].weight.detach()


@pytest.mark.parametrize(
    ("quantizer", "num_bits", "coefficients"),
    [
        ("nf4", 4, 1),  # a scale
        ("log", 5, 1),
        ("apot", 4, 1),
        ("binary", 1, 1),
        ("ternary", 2, 1),
        ("binary_code", 4, 4),  # a coefficient a bit
        ("lq", 3, 3),
    ],
)
def test_levels_are_patterns_times_as_many_coefficients_as_the_method_has(
    quantizer: str, num_bits: int, coefficients: int
) -> None:
    stored, weight = table(quantizer, num_bits=num_bits)
    assert stored.codes.numel() == weight.numel() * num_bits // 8
    assert stored.patterns.shape == (2**num_bits, coefficients)
    assert torch.allclose(stored(None), weight, rtol=1e-5, atol=2e-6 * float(weight.abs().max()))


def test_a_moved_zero_is_a_second_coefficient() -> None:
    stored, weight = table("hqq", num_bits=4, symmetric=False, signed=False)
    assert stored.patterns.shape == (16, 2)
    assert (stored(None) - weight).abs().max() < 2e-6 * weight.abs().max()


def test_fitted_levels_are_kept_block_by_block() -> None:
    stored, weight = table("codebook", "channel", num_bits=3)
    assert stored.patterns.shape == (64 * 8, 1)
    assert torch.equal(stored(None), weight)


def test_one_block_has_one_pattern() -> None:
    stored, weight = table("codebook", "layer", num_bits=3)
    assert stored.patterns.shape == (8, 1)
    assert torch.equal(stored(None), weight)


def test_codewords_of_several_values_are_looked_up_whole() -> None:
    stored, weight = table({"name": "vector", "dim": 4}, "layer", num_bits=6)
    assert stored.codes.numel() == weight.numel() // 4 * 6 // 8
    assert stored.patterns.shape == (64, 4)
    assert torch.equal(stored(None), weight)


def test_scales_that_are_powers_of_two_take_a_byte() -> None:
    mx = {"name": "float", "exponent_bits": 2, "mantissa_bits": 1, "block_scale": "e8m0"}
    stored, weight = table(mx, {"name": "subchannel", "group_size": 32}, num_bits=4)
    assert stored.index.numel() == 2 * BLOCKS
    assert stored.coefficients.numel() < 8
    assert torch.equal(stored(None), weight)


class Neighbours(Quantizer[Any]):
    """A code stands for its own value and half of its neighbour's."""

    name = "neighbours"

    def fit(self, stats: Any, range: Range | None, spec: QuantSpec) -> QParams:  # noqa: ANN401
        raise NotImplementedError

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        return x.round().clamp(spec.quant_min, spec.quant_max)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        return codes + codes.roll(1, -1) / 2


def slot(quantizer: Quantizer[Any], num_bits: int) -> Slot:
    from qpipe_methods.calibrator.minmax import MinMaxCalibrator
    from qpipe_methods.granularity.channel import PerChannel

    spec = QuantSpec(num_bits=num_bits, role=Role.WEIGHT)
    return Slot(quantizer, MinMaxCalibrator(), PerChannel(), spec)


@pytest.mark.parametrize(
    ("num_bits", "message"), [(4, "depends on the codes beside it"), (12, "or less, not 12")]
)
def test_codes_that_no_table_holds_are_refused(num_bits: int, message: str) -> None:
    fake_quant = FakeQuant(slot(Neighbours(), num_bits), "fc:weight")
    fake_quant.set_qparams(QParams(torch.ones(4, 1), torch.zeros(4, 1)))
    with pytest.raises(RecipeError, match=message):
        TabledWeight(fake_quant, torch.randn(4, 8) * 3)

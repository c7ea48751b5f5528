"""Ranges taken from each tensor as it passes."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.calibrator.mse import MSECalibrator
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.token import PerToken
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import Calibrator, Granularity, QuantSpec, Slot
from qpipe.nn import FakeQuant

SPEC = QuantSpec(8, restricted=True, dynamic=True)


def dynamic(calibrator: Calibrator, granularity: Granularity, spec: QuantSpec = SPEC) -> FakeQuant:
    return FakeQuant(Slot(UniformQuantizer(), calibrator, granularity, spec), "edge")


def test_a_token_has_its_own_scale() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    got = dynamic(MinMaxCalibrator(), PerToken())(x)
    scale = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(got, (x / scale).round() * scale)


def test_a_layer_follows_each_tensor() -> None:
    quantizer = dynamic(MinMaxCalibrator(), PerLayer())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantizer(x * 8), quantizer(x) * 8)


@pytest.mark.parametrize("num_bits", [3, 4])
def test_a_search_serves_dynamic_ranges_too(num_bits: int) -> None:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(num_bits, dynamic=True)
    searched, unclipped = (
        (dynamic(calibrator, PerToken(), spec)(x) - x).square().sum()
        for calibrator in (MSECalibrator(), MinMaxCalibrator())
    )
    assert searched < unclipped


def test_the_gradient_passes_and_half_precision_stays() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    got = dynamic(MinMaxCalibrator(), PerToken())(x)
    assert got.dtype is torch.bfloat16
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.float().mean() > 0.8

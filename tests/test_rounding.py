"""Stochastic rounding belongs to training: a quantizer in a model settles for nearest elsewhere."""

from __future__ import annotations

import pytest
import torch
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer

from qpipe import QParams, QuantSpec, RecipeError, Slot
from qpipe.choices import build_recipe, library_config
from qpipe.nn import FakeQuant
from qpipe.registry import PluginRegistry


def test_only_a_model_in_training_rounds_stochastically() -> None:
    """2.25 becomes 2 or 3 while training, always 2 as placed, in eval mode and as a code."""
    spec = QuantSpec(num_bits=4)
    slot = Slot(UniformQuantizer(rounding="stochastic"), MinMaxCalibrator(), PerLayer(), spec)
    fake_quant = FakeQuant(slot, "x")
    fake_quant.set_qparams(QParams(torch.ones(1, 1), torch.zeros(1, 1)))
    x = torch.full((4, 100), 2.25, requires_grad=True)
    assert fake_quant(x).unique().tolist() == [2]
    assert fake_quant.train()(x).unique().tolist() == [2, 3]
    assert fake_quant.codes(x).unique().tolist() == [2]
    assert fake_quant.eval()(x).unique().tolist() == [2]


def test_another_rounding_is_refused() -> None:
    words = {"quantizer": {"name": "log", "rounding": "random"}}
    with pytest.raises(RecipeError, match="rounding=random is unknown; use nearest or stochastic"):
        build_recipe(library_config(words, exporting=False), PluginRegistry.load_installed())

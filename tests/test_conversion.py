from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qpipe_methods.granularity.group import PerGroup
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.subchannel import PerSubchannel
from torch import Tensor, nn

from qpipe import Granularity, Recipe, RecipeError, Task, convert
from qpipe.conversion import CodedWeight
from qpipe.stages.calibrate import calibrate_weights
from qpipe.stages.prepare import prepare


class Net(nn.Module):
    """A layer of each layout, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.conv(x))).mean((2, 3))
        logits: Tensor = self.second(torch.relu(self.first(x)))
        return logits


Quantized = Callable[..., tuple[nn.Module, Tensor]]


@pytest.fixture
def quantized(make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None]) -> Quantized:
    def build(granularity: Granularity | None = None, **spec: object) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model, x, recipe = Net().eval(), torch.randn(6, 4, 8, 8), make_recipe()
        slot = recipe.weight
        assert slot is not None
        slot = replace(slot, spec=replace(slot.spec, **spec), granularity=granularity or slot.granularity)  # type: ignore[arg-type]
        prepare(model, [x], Task(), replace(recipe, weight=slot))
        calibrate_on(model, x)
        return model, x

    return build


@pytest.mark.parametrize(
    "granularity", [None, PerLayer(), PerGroup(num_groups=2), PerSubchannel(group_size=2)], ids=str
)
def test_the_converted_model_computes_what_the_simulation_computes(
    quantized: Quantized, granularity: Granularity | None
) -> None:
    model, x = quantized(granularity)
    with torch.no_grad():
        simulated, converted = model(x), convert(model)(x)
    assert torch.allclose(converted, simulated, atol=2e-2)
    assert (converted - simulated).abs().median() < 1e-6


def test_weights_are_the_very_values_of_the_simulation(quantized: Quantized) -> None:
    model, _ = quantized()
    converted = convert(model)
    for name in ("conv", "up", "first", "second"):
        assert torch.equal(converted.get_submodule(name).weight, model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("spec", "dtype", "largest"),
    [
        ({}, torch.int8, 127),
        ({"num_bits": 4}, torch.int8, 7),
        ({"num_bits": 12}, torch.int16, 2047),
        ({"signed": False, "symmetric": False, "restricted": False}, torch.uint8, 255),
    ],
)
def test_codes_fill_the_smallest_integers(
    quantized: Quantized, spec: dict[str, object], dtype: torch.dtype, largest: int
) -> None:
    converted = convert(quantized(**spec)[0])
    codes = converted.get_submodule("conv.weight_quantizer").codes
    assert codes.dtype is dtype
    assert codes.shape == (8, 4, 3, 3)
    assert codes.abs().amax() == largest


def test_few_bits_lose_their_zero_points_and_keep_their_values(quantized: Quantized) -> None:
    unsigned = {"signed": False, "symmetric": False, "restricted": False}
    model, _ = quantized(num_bits=4, **unsigned)
    conv, coded = model.get_submodule("conv"), convert(model).get_submodule("conv.weight_quantizer")
    alone = CodedWeight(conv.weight_quantizer, conv._parameters["weight"])
    assert alone.zero_point.any()
    assert alone.codes.dtype is torch.uint8
    assert not coded.zero_point.any()
    assert coded.codes.dtype is torch.int8
    rows = coded.codes.flatten(1)
    assert (rows.amax(1) - rows.amin(1) == 15).all()  # all steps are there, wherever zero lies
    assert torch.equal(coded(None), conv.weight)
    assert torch.equal(alone(None), conv.weight)
    eight = convert(quantized(**unsigned)[0]).get_submodule("conv.weight_quantizer")
    assert eight.zero_point.any()  # 255 steps do not fit int8


def test_no_float_weight_is_left_and_the_model_is_untouched(quantized: Quantized) -> None:
    model, _ = quantized()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert(model)
    assert {name for name, _ in converted.named_parameters()} == {
        "conv.bias",
        "up.bias",
        "first.bias",
        "second.bias",
    }
    assert sum(isinstance(module, CodedWeight) for module in converted.modules()) == 3  # one of the tied pair
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_engines_see_their_own_operations(quantized: Quantized) -> None:
    model, x = quantized()
    exported = torch.export.export(convert(model), (x,), strict=False)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "quantized_decomposed.dequantize_per_channel.default" in called
    assert "quantized_decomposed.quantize_per_tensor.default" in called


def test_a_dynamic_range_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    recipe, model, x = make_recipe(), Net().eval(), torch.randn(2, 4, 8, 8)
    assert recipe.activation is not None
    dynamic = replace(recipe.activation, spec=replace(recipe.activation.spec, dynamic=True))
    prepare(model, [x], Task(), replace(recipe, activation=dynamic))
    calibrate_weights(model)
    with pytest.raises(RecipeError, match=r"is dynamic; set activation\.dynamic=false"):
        convert(model)

"""SmoothQuant and AWQ: where channels can be scaled, what is kept, and the papers' own facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_methods.quantizer.uniform import UniformQuantizer
from qpipe_methods.transform._scaling import Junction, find_junctions, recorded
from qpipe_methods.transform.awq import AWQ, _Seen, output_error
from qpipe_methods.transform.smoothquant import SmoothQuant
from torch import Tensor, nn

import qpipe
from qpipe import QuantSpec, Recipe, Role, Slot, Task, Transform

HEADS, KV_HEADS, SIZE = 4, 2, 3
WIDTH = HEADS * SIZE


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A decoder's block: grouped heads, a gated product; and a head that shares what the last norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(WIDTH), Norm(), Norm()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * SIZE) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 16, bias=False) for _ in range(2))
        self.down = nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).view(*h.shape[:2], -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = (y[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(q.shape) for y in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        h = self.norm3(x)
        return torch.cat([self.head(h), h], -1)  # read by more than linear layers: left alone


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Block().double().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    outliers = torch.ones(WIDTH, dtype=torch.double)
    outliers[3] = 30
    return [torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.double) * outliers for _ in range(3)]


def weight_recipe(make_recipe: Callable[..., Recipe], num_bits: int = 3) -> Recipe:
    spec = QuantSpec(num_bits=num_bits, restricted=True, role=Role.WEIGHT)
    slot = Slot(UniformQuantizer(), MinMaxCalibrator(), PerSubchannel(4), spec)
    return make_recipe("generic", weight=slot, activation=None)


def test_junctions_are_where_nothing_else_reads(model: nn.Module, batches: Sequence[Tensor]) -> None:
    found = find_junctions(model, recorded(model, batches, Task()))
    assert [(j.readers, [path for path, _ in j.source]) for j in found] == [
        (("q", "k", "v"), ["norm1", "norm1"]),
        (("o",), ["v", "v"]),
        (("gate", "up"), ["norm2"]),
        (("down",), ["up"]),
    ]
    assert found[1].index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # two heads a value


@pytest.mark.parametrize("transform", [SmoothQuant(), SmoothQuant(0.8), AWQ()], ids=["0.5", "0.8", "awq"])
def test_the_function_is_kept(
    transform: Transform, model: nn.Module, batches: list[Tensor], make_recipe: Callable[..., Recipe]
) -> None:
    before, weight = [model(x) for x in batches], model.get_submodule("q").weight.clone()
    transform.apply(model, batches, Task(), weight_recipe(make_recipe))
    assert not torch.equal(weight, model.get_submodule("q").weight)
    for x, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_smoothquant_halfway_makes_both_maxima_their_geometric_mean(
    batches: list[Tensor], make_recipe: Callable[..., Recipe]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(WIDTH) * 30)

    def largest() -> tuple[Tensor, Tensor]:
        x = torch.cat([model[0](x).flatten(0, 1) for x in batches])
        return x.abs().amax(0), model[1].weight.abs().amax(0)

    x, w = largest()
    SmoothQuant().apply(model, batches, Task(), make_recipe("generic"))
    for after in largest():
        torch.testing.assert_close(after, (x * w).sqrt(), rtol=1e-5, atol=0)


def test_smoothquant_scale_by_hand() -> None:
    scale = SmoothQuant(0.75).scale(torch.tensor([16.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 16.0, 2.0, 0.0]))
    assert scale.tolist() == [8.0, 0.5, 1.0, 1.0]  # 16^.75 / 1^.25, 1^.75 / 16^.25; dead channels stay
    with pytest.raises(ValueError, match="share from 0 to 1"):
        SmoothQuant(1.5)


def test_awq_with_power_zero_is_rounding_to_nearest(
    model: nn.Module, batches: list[Tensor], make_recipe: Callable[..., Recipe]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    AWQ(steps=1).apply(model, batches, Task(), weight_recipe(make_recipe))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def naive_rounded(weight: Tensor, num_bits: int, group: int) -> Tensor:
    top = 2 ** (num_bits - 1) - 1
    blocks = weight.reshape(-1, group)
    step = blocks.abs().amax(1, keepdim=True) / top
    return ((blocks / step).round() * step).reshape(weight.shape)


def test_awq_chooses_what_brute_force_does(make_recipe: Callable[..., Recipe]) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 8, generator=generator) * torch.tensor([1, 1, 20, 1, 0.1, 5, 1, 1])
    weights = [torch.randn(6, 8, generator=generator), torch.randn(3, 8, generator=generator)]
    recipe = weight_recipe(make_recipe)
    slots, junction = [recipe.weight, recipe.weight], Junction(("a", "b"), (), torch.arange(8))
    seen = _Seen(8)
    seen.add(x, len(x))
    scale = AWQ(steps=20).scale(junction, seen, weights, slots)
    errors = {}
    for step in range(20):
        s = x.abs().mean(0) ** (step / 20)
        s = s / (s.max() * s.min()) ** 0.5
        rounded = [naive_rounded(w * s, 3, 4) for w in weights]
        errors[step] = sum(
            ((x / s) @ r.T - x @ w.T).square().sum().item() for r, w in zip(rounded, weights, strict=True)
        )
    best = min(errors, key=errors.__getitem__)
    assert best > 0
    expected = x.abs().mean(0) ** (best / 20)
    torch.testing.assert_close(scale, expected / (expected.max() * expected.min()) ** 0.5)
    assert output_error(x, weights, slots, scale) == pytest.approx(errors[best], rel=1e-4)
    assert errors[best] < 0.7 * output_error(x, weights, slots, torch.ones(8))


def test_smoothing_helps_where_one_channel_is_large() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)), torch.randn(64, WIDTH)
    with torch.no_grad():
        model[0].weight[3] = 100
        model[1].weight[:, 3] /= 100
    choices: dict[str, Any] = {"target": "generic", "evaluator": ["sqnr"], "granularity": "channel"}
    plain, smooth = (
        qpipe.quantize(model, x, transform=transform, **choices)[1].metrics["simulated"]["sqnr_db"]
        for transform in ([], ["smoothquant"])
    )
    assert smooth > plain + 15

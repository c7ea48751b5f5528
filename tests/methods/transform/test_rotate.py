"""Rotation: Hadamard matrices, what is kept, and what it does to an outlier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qpipe_methods.transform.rotate import Rotate, hadamard, randomised_hadamard
from torch import Tensor, nn

import qpipe
from qpipe import Recipe, RecipeError, Task

WIDTH, WORDS = 12, 9


class Norm(nn.Module):
    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        if self.mean:
            x = x - x.mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    def __init__(self, tied: bool, mean: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(Norm(mean) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        x = x + self.mix(self.norms[0](x))
        x = self.down(F.gelu(self.up(self.norms[1](x)))) + x
        logits: Tensor = self.head(self.norms[2](x))
        return logits


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 96, 384, 576, 1536])
def test_rows_are_orthogonal_and_of_ones(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.long))
    assert torch.equal(matrix.double() @ matrix.double().T, size * torch.eye(size, dtype=torch.double))


def test_signs_keep_lengths_and_spread_an_outlier() -> None:
    rotation = randomised_hadamard(16, seed=3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.double))
    assert not torch.equal(rotation, randomised_hadamard(16, seed=4))
    one_hot = torch.eye(16, dtype=torch.double)[5]
    assert torch.equal((one_hot @ rotation).abs(), torch.full((16,), 0.25, dtype=torch.double))
    with pytest.raises(RecipeError, match="no Hadamard matrix of a size with the factor 7"):
        hadamard(14)


@pytest.mark.parametrize("tied", [True, False])
def test_the_function_is_kept_and_scales_are_folded(tied: bool, make_recipe: Callable[..., Recipe]) -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(tied).double().eval(), torch.randint(0, WORDS, (2, 5))
    before, embedding = model(tokens), model.embed.weight.clone()
    Rotate().apply(model, [tokens], Task(), make_recipe())
    torch.testing.assert_close(model(tokens), before, rtol=1e-9, atol=1e-9)
    rotation = randomised_hadamard(WIDTH)
    torch.testing.assert_close(model.embed.weight, embedding @ rotation)
    assert all(bool((norm.weight == 1).all()) for norm in model.norms)
    assert model.head.weight is not model.embed.weight


def test_an_outlier_in_the_stream_no_longer_costs_the_rest() -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(tied=False).eval(), torch.randint(0, WORDS, (64, 5))
    with torch.no_grad():
        model.embed.weight[:, 4] = 100
    choices: dict[str, Any] = {"target": "generic", "granularity": "channel", "evaluator": ["sqnr"]}
    plain, rotated = (
        qpipe.quantize(model, tokens, transform=transform, **choices)[1].metrics["simulated"]["sqnr_db"]
        for transform in ([], ["rotate"])
    )
    assert rotated > plain + 3


def test_models_without_such_a_stream_are_refused(make_recipe: Callable[..., Recipe]) -> None:
    tokens = torch.randint(0, WORDS, (2, 5))
    with pytest.raises(RecipeError, match=r"needs norms that only scale, and 'norms\.0' does not"):
        Rotate().apply(Decoder(tied=False, mean=True), [tokens], Task(), make_recipe())
    with pytest.raises(RecipeError, match="no residual stream that starts at an embedding"):
        Rotate().apply(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], Task(), make_recipe())
    read_plainly = nn.Sequential(nn.Embedding(WORDS, WIDTH), Norm(), nn.ReLU())
    with pytest.raises(RecipeError, match="reads what '1' gives"):
        Rotate().apply(read_plainly, [tokens], Task(), make_recipe())

"""Operations other than the convolutions and products of test_exporter: executed and proved, or refused."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from qpipe import Artifact, Recipe

Export = Callable[..., tuple[nn.Module, Artifact]]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.up(torch.relu(self.down(x))))
        return y


class Gated(nn.Module):
    """Concatenation, product and sum of what two layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.left(x)), self.right(x)
        y: Tensor = self.head(torch.cat([left * torch.sigmoid(right), left + right], 1))
        return y


class Attention(nn.Module):
    """Embeddings, two products of activations, softmax and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.query, self.key, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        weights = torch.softmax(torch.matmul(self.query(x), self.key(x).transpose(1, 2)) / 4, -1)
        y: Tensor = self.head(torch.matmul(weights, x).mean(1))
        return y


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 4)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cells(x)[0][:, -1])
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (Transposed, (4, 3, 8, 8)),
    "gated": (Gated, (4, 3, 6, 6)),
    "attention": (Attention, (4, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 5, 8)),
}


ON_CODES: dict[
    str, dict[str, int]
] = {  # what ONNX Runtime executes; ConvTranspose, LSTM, GRU have no int8 form
    "transposed": {"QLinearConv": 1, "ConvTranspose": 1},
    "gated": {"QLinearConv": 2, "QLinearAdd": 1, "QLinearConcat": 1, "Mul": 1},
    "attention": {"QLinearMatMul": 2, "MatMulIntegerToFloat": 2, "QGemm": 1, "GatherBlockQuantized": 1},
    "lstm": {"LSTM": 1, "QGemm": 1},
    "gru": {"GRU": 1, "QGemm": 1},
}
EDGES = {"transposed": 2, "gated": 6, "attention": 7, "lstm": 2, "gru": 2}
COMPARED = {
    "transposed": 2,
    "gated": 3,
    "attention": 4,
    "lstm": 1,
    "gru": 1,
}  # one by one; cells with the whole


def exported(name: str, export: Export, recipe: Recipe | None = None) -> Artifact:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randint(30, shape) if len(shape) == 2 else torch.randn(shape)
    return export(make(), [x], recipe)[1]


@pytest.mark.parametrize("name", MODELS)
def test_quantized_edges_are_within_one_step(name: str, export: Export) -> None:
    proof = exported(name, export).proof
    assert proof["nodes"].items() >= ON_CODES[name].items()
    assert proof["edges"] == EDGES[name]
    assert proof["largest_edge_difference_steps"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_weights_alone_are_codes_and_compute_what_is_simulated(
    name: str, export: Export, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    artifact = exported(name, export, make_recipe(activation=None))
    assert artifact.proof["layers"] == COMPARED[name]
    assert artifact.proof["largest_layer_difference"] < 1e-6
    assert artifact.proof["max_difference_steps"] < 1e-2
    stored = onnx.load(tmp_path / artifact.path).graph.initializer
    floats = [t for t in stored if t.data_type == onnx.TensorProto.FLOAT]
    assert max(prod(t.dims) for t in floats) <= 128  # the biases of a cell; its least weight has 384

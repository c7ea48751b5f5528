"""Layers left in floating point between quantized activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qpipe_onnx import _graph
from torch import Tensor, nn

from qpipe import Artifact, ProofError, Recipe, Role
from qpipe.recipe import LayerRule, SlotEdit

Export = Callable[..., tuple[nn.Module, Artifact]]


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3)
        self.middle = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.wide = nn.Linear(6, 8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.middle(torch.relu(self.stem(x)))))
        x = torch.relu(self.wide(x.permute(0, 2, 3, 1)))
        logits: Tensor = self.fc2(torch.relu(self.fc1(x.mean((1, 2)))))
        return logits


def exported(name: str, channels: int, export: Export, make_recipe: Callable[..., Recipe]) -> Artifact:
    torch.manual_seed(0)
    recipe = make_recipe(layers=(LayerRule(name, {Role.WEIGHT: SlotEdit(off=True)}),))
    return export(Net(channels), [torch.randn(16, channels, 12, 12)], recipe)[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_its_products_are_in_floating_point(
    channels: int, export: Export, make_recipe: Callable[..., Recipe]
) -> None:
    artifact = exported("[!f]*", channels, export, make_recipe)
    assert artifact.proof["equal_codes_percent"] > 99.9
    assert not {"QLinearConv", "QLinearMatMul"} & artifact.proof["nodes"].keys()
    assert artifact.proof["nodes"]["QGemm"] == 2  # fc1 and fc2 stay on codes


@pytest.mark.parametrize("name", ["stem", "up", "fc1"])
def test_the_proof_names_one_whose_weights_are_rounded(
    name: str, export: Export, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_graph, "_keep_float", lambda graph, node: None)
    with pytest.raises(ProofError, match=f"computes '{name}' with weights it rounds"):
        exported(name, 3, export, make_recipe)

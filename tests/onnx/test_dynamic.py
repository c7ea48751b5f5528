"""Ranges taken while running: the file takes the same, and multiplies by codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.calibrator.mse import MSECalibrator
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.token import PerToken
from qpipe_onnx._agreement import step_by_step
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import Tensor, nn

from qpipe import Artifact, ProofError, QuantSpec, Recipe, Task, convert

Exported = tuple[nn.Module, Artifact, Path]
SLOTS = {
    "layer": (PerLayer(), QuantSpec(symmetric=False, signed=False, dynamic=True)),
    "token": (PerToken(), QuantSpec(restricted=True, dynamic=True)),
}


class Tokens(nn.Module):
    """Products of three dimensions that share an input, one behind a slice, one of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 32)
        self.query, self.key = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.first, self.last = nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.embedding(tokens))
        x = torch.tanh(self.query(x) + self.key(x))
        logits: Tensor = self.last(torch.relu(self.first(x[:, 0])))
        return logits


_EXPORTED: dict[str, Exported] = {}


@pytest.fixture(params=SLOTS)
def exported(
    request: pytest.FixtureRequest,
    export: Callable[..., tuple[nn.Module, Artifact]],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> Exported:
    """Export once a kind of range."""
    kind: str = request.param
    if kind not in _EXPORTED:
        torch.manual_seed(0)
        recipe = dynamic(make_recipe, kind)
        simulation, artifact = export(Tokens(), [torch.randint(30, (6, 7))], recipe)
        _EXPORTED[kind] = (simulation, artifact, tmp_path / artifact.path)
    return _EXPORTED[kind]


def dynamic(make_recipe: Callable[..., Recipe], kind: str) -> Recipe:
    recipe = make_recipe("x86_linear")
    assert recipe.activation is not None
    granularity, spec = SLOTS[kind]
    return replace(recipe, activation=replace(recipe.activation, granularity=granularity, spec=spec))


def test_products_are_computed_on_codes(exported: Exported) -> None:
    """All of them with one range a tensor; a slice keeps a token's scale within the product."""
    nodes = exported[1].proof["nodes"]
    products = nodes["MatMulIntegerToFloat"] + nodes.get("DynamicQuantizeMatMul", 0)
    assert products == (3 if "ReduceMax" in nodes else 4)
    assert nodes.get("MatMulNBits", 0) == 4 - products
    assert not nodes.keys() & {"MatMul", "Gemm"}


def test_every_edge_is_within_a_step(exported: Exported) -> None:
    proof = exported[1].proof
    assert proof["edges"] == 3
    assert proof["largest_edge_difference_steps"] <= 1
    assert proof["sqnr_db"] > 40


def test_ranges_follow_the_input(exported: Exported) -> None:
    """Another input than the proof's, in another shape, whose ranges differ."""
    simulation, artifact, _ = exported
    assert artifact.module is not None
    x = torch.randint(30, (2, 3), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        executed, simulated = artifact.module(x), simulation(x)
    assert 10 * torch.log10(simulated.square().mean() / (executed - simulated).square().mean()) > 30


def test_an_edge_that_is_computed_otherwise_is_named(exported: Exported) -> None:
    simulation, _, path = exported
    converted = convert(simulation, dynamic=True)
    converted.get_submodule("query.weight_quantizer").codes.neg_()
    with pytest.raises(ProofError, match=r"edge 'tanh' \d+ steps away"):
        step_by_step(converted, path, ((torch.randint(30, (4, 7)),), {}), Task())


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("layer", {"spec": QuantSpec(dynamic=True)}, "activation.symmetric=false activation.signed=false"),
        ("token", {"spec": SLOTS["layer"][1]}, "activation.symmetric=true activation.signed=true"),
        ("token", {"calibrator": MSECalibrator()}, "not what calibrator 'mse' does"),
    ],
)
def test_ranges_the_engine_does_not_take_are_said(
    kind: str, changes: dict[str, Any], reason: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = dynamic(make_recipe, kind)
    assert OnnxExporter().reason_not(recipe) is None
    assert recipe.activation is not None
    changed = replace(recipe, activation=replace(recipe.activation, **changes))
    assert reason in str(OnnxExporter().reason_not(changed))

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qpipe_methods.exporter.torch import TorchExporter
from qpipe_methods.granularity.subchannel import PerSubchannel
from torch import Tensor, nn

from qpipe import DataError, ExportContext, Recipe, convert

MakeContext = Callable[..., ExportContext]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        logits: Tensor = self.fc(torch.relu(x + self.conv(x)).mean((2, 3)))
        return logits


@pytest.fixture
def context(make_context: MakeContext) -> ExportContext:
    torch.manual_seed(0)
    return make_context(Residual(), [torch.randn(8, 3, 8, 8), torch.randn(3, 3, 8, 8)])


def test_a_loaded_program_is_the_converted_model_for_any_batch(context: ExportContext) -> None:
    artifact = TorchExporter().export(context)
    loaded = TorchExporter.load(context.folder / artifact.path)
    assert loaded is not None
    converted = convert(context.simulation)
    with torch.no_grad():
        for size in (1, 5):
            batch = torch.randn(size, 3, 8, 8)
            assert torch.equal(loaded(batch), converted(batch))
    assert artifact.proof["bit_equal"]
    assert artifact.proof["samples"] == 11
    assert artifact.proof["sqnr_db"] > 40


def test_the_program_holds_codes_and_no_float_weights(context: ExportContext) -> None:
    artifact = TorchExporter().export(context)
    assert artifact.module is not None
    tensors = dict(artifact.module.named_parameters()) | dict(artifact.module.named_buffers())
    assert {x.dtype for x in tensors.values() if x.dim() > 1} == {torch.int8}


def test_blocks_of_four_bits_keep_their_function(
    make_context: MakeContext, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("generic", activation=None)
    assert recipe.weight is not None
    spec = replace(recipe.weight.spec, num_bits=4)
    recipe = replace(
        recipe, weight=replace(recipe.weight, spec=spec, granularity=PerSubchannel(group_size=16))
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    artifact = TorchExporter().export(make_context(model, [torch.randn(4, 32)], recipe))
    assert artifact.proof["max_difference_steps"] < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_makes_int8_kernels(context: ExportContext) -> None:
    proof = TorchExporter(compile=True).export(context).proof
    assert proof["kernels"].get("qconv2d_pointwise", 0) + proof["kernels"].get("qconv_pointwise", 0) >= 2
    assert proof["compiled_sqnr_db"] > 30


def test_a_damaged_program_is_refused(context: ExportContext, tmp_path: Path) -> None:
    artifact = TorchExporter().export(context)
    path = tmp_path / "short.pt2"
    path.write_bytes((context.folder / artifact.path).read_bytes()[:-500])
    with pytest.raises(DataError, match=r"short.pt2 is no program torch can load"):
        TorchExporter.load(path)


def test_what_cannot_be_expressed_is_said_in_a_sentence(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert recipe.activation is not None
    dynamic = replace(recipe.activation, spec=replace(recipe.activation.spec, dynamic=True))
    assert TorchExporter().reason_not(recipe) is None
    assert "dynamic=true" in str(TorchExporter().reason_not(replace(recipe, activation=dynamic)))

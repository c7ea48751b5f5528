from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from qpipe_methods.granularity.subchannel import PerSubchannel
from safetensors.torch import load_file
from torch import nn

from qpipe import DataError, ExportContext, Recipe, RecipeError
from qpipe.packing import packed_bytes

pytest.importorskip("transformers", reason="pip install 'qpipe-quant[compressed-tensors]'")
pytest.importorskip("compressed_tensors", reason="pip install 'qpipe-quant[compressed-tensors]'")

import transformers
from qpipe_compressed_tensors.exporter.compressed_tensors import CompressedTensorsExporter

MakeContext = Callable[..., ExportContext]
TOKENS = [{"input_ids": torch.arange(24).reshape(2, 12) % 64}]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def weights_only(recipe: Recipe, group_size: int | None, **spec: Any) -> Recipe:  # noqa: ANN401
    assert recipe.weight is not None
    weight = replace(recipe.weight, spec=replace(recipe.weight.spec, **spec))
    if group_size is not None:
        weight = replace(weight, granularity=PerSubchannel(group_size=group_size))
    return replace(recipe, weight=weight, activation=None)


@pytest.mark.parametrize(
    ("group_size", "spec"),
    [
        (16, {"num_bits": 4}),
        (None, {"num_bits": 8}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_back_the_simulations_logits(
    group_size: int | None,
    spec: dict[str, Any],
    make_context: MakeContext,
    make_recipe: Callable[..., Recipe],
) -> None:
    context = make_context(llama(), TOKENS, weights_only(make_recipe("generic"), group_size, **spec))
    artifact = CompressedTensorsExporter().export(context)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(context.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, expected = (model(**TOKENS[0]).logits for model in (loaded, context.simulation))
        floats = context.reference(**TOKENS[0]).logits
    assert torch.allclose(logits, expected, atol=1e-6)
    assert (floats - expected).abs().max() > 1e-4  # the codes are not the floats
    assert artifact.proof["stored_as_reals"] == ["model.embed_tokens.weight"]
    tensors = load_file(context.folder / "model.safetensors")
    packed = tensors["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.nbytes == packed_bytes(64 * 32, spec["num_bits"])
    assert "model.layers.0.mlp.up_proj.weight" not in tensors


@pytest.mark.filterwarnings("ignore")
def test_tied_heads_are_stored_once_and_as_reals(
    make_context: MakeContext, make_recipe: Callable[..., Recipe]
) -> None:
    context = make_context(llama(tied=True), TOKENS, weights_only(make_recipe("generic"), None, num_bits=4))
    artifact = CompressedTensorsExporter().export(context)
    assert artifact.proof["max_difference_steps"] < 0.01
    assert artifact.proof["stored_as_reals"] == ["model.embed_tokens.weight"]
    config = json.loads((context.folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in load_file(context.folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_a_changed_folder_is_refused(make_context: MakeContext, make_recipe: Callable[..., Recipe]) -> None:
    context = make_context(llama(), TOKENS, weights_only(make_recipe("generic"), 16, num_bits=4))
    CompressedTensorsExporter().export(context)
    path = context.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["os"]}))
    with pytest.raises(DataError, match="names the architecture 'os'"):
        CompressedTensorsExporter.load(path)
    path.write_text(json.dumps({**config, "transformers_weights": "../other/model.safetensors"}))
    with pytest.raises(DataError, match=r"reads weights from another file \('\.\./other"):
        CompressedTensorsExporter.load(path)
    path.write_text(json.dumps(config))
    tensors = context.folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"is not the file config.json was written for"):
        CompressedTensorsExporter.load(path)


def test_what_the_format_does_not_hold_is_said(
    make_context: MakeContext, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("generic")
    assert "weights alone" in str(CompressedTensorsExporter().reason_not(recipe))
    three = weights_only(recipe, None, num_bits=3)
    asymmetric = weights_only(recipe, None, num_bits=4, symmetric=False, restricted=False)
    assert "zero points" in str(CompressedTensorsExporter().reason_not(asymmetric))
    assert "weight.num_bits=3" in str(CompressedTensorsExporter().reason_not(three))
    model = nn.Sequential(nn.Linear(4, 4))
    context = make_context(model, [torch.randn(2, 4)], weights_only(recipe, None, num_bits=4))
    with pytest.raises(RecipeError, match="holds no model of transformers"):
        CompressedTensorsExporter().export(context)

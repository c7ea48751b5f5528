from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from qpipe_zoo.data.text import Text
from qpipe_zoo.model.hf import hf
from qpipe_zoo.task.language_modeling import LanguageModeling
from torch import nn

from qpipe import DataError, PluginError, RecipeError
from qpipe.__main__ import main
from qpipe.nn import disabled

WORDS = "It is a truth universally acknowledged, that a single man in possession of a good fortune. "


def test_a_folder_is_the_model_it_holds(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, expected = hf(str(tiny_llama)), AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        output = model(input_ids=tokens)
        torch.testing.assert_close(output.logits, expected(input_ids=tokens).logits)
    assert [*output] == ["logits"]  # no cache
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_would_be_made_up_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    norm = weights["model.norm.weight"]
    save_file({**weights, "model.norm.weight": norm[:-1].clone()}, file, {"format": "pt"})
    sizes = rf"\[{len(norm) - 1}\] in the files and \[{len(norm)}\] by config.json"
    with pytest.raises(RecipeError, match=rf"'model\.norm\.weight' is {sizes}"):
        hf(str(tmp_path))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=f"lacks 1 of the weights of LlamaForCausalLM, '{name}' first"):
        hf(str(tmp_path))


def test_an_encoder_is_read_as_what_its_configuration_names(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for kind in (BertModel, BertForSequenceClassification):
        kind(BertConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path)
        assert type(hf(str(tmp_path))) is kind


def test_a_gguf_file_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = hf(str(tiny_llama))
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for kind, count in heads.items():  # the file keeps the halves of a rotary pair side by side
            if kind in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    tokens = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        for path in (tmp_path, tmp_path / "tiny.gguf"):
            read = hf(str(path))
            torch.testing.assert_close(read(input_ids=tokens).logits, model(input_ids=tokens).logits)
    read.save_pretrained(tmp_path / "float")  # a float model now


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="there is no such folder"):
        hf(str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match=r"neither a config\.json nor a \.gguf file"):
        hf(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(RecipeError, match="is no JSON"):
        hf(str(tmp_path))
    config.write_text(json.dumps({"architectures": ["Pipeline"]}))  # a name transformers has, but no model
    with pytest.raises(RecipeError, match="has no architecture 'Pipeline'"):
        hf(str(tmp_path))
    config.write_text(json.dumps({"auto_map": {"AutoModel": "code.Net"}}))
    with pytest.raises(RecipeError, match=r"if you trust it say model\.trust_remote_code=true"):
        hf(str(tmp_path))
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(RecipeError, match="cannot be read as a model"):
        hf(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(PluginError, match=r"pip install 'qpipe-quant\[llm\]'"):
        hf(str(tmp_path))


def text(tmp_path: Path, tokenizer: Path, **words: object) -> Text:
    (tmp_path / "own.txt").write_text(WORDS * 20)
    (tmp_path / "other.txt").write_text("0123456789" * 20)
    data = Text(str(tmp_path / "own.txt"), str(tokenizer), **{"length": 16, **words})
    data.setup()
    return data


def test_halves_of_a_text_calibrate_and_evaluate(tmp_path: Path, tiny_llama: Path) -> None:
    other = str(tmp_path / "other.txt")
    data = text(tmp_path, tiny_llama, other=other, num_calibration=10, num_evaluation=10**6, batch_size=4)
    assert [len(part) for part in data.parts] == [10, len(WORDS) * 20 // 16 // 2 + 1, 12]
    own, foreign = data.test_dataloader()
    batch = next(iter(own))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    half = len(WORDS) * 20 // 16 // 2 * 16
    assert tokenizer.decode(batch["input_ids"].flatten()) == (WORDS * 20)[half : half + 64]
    assert tokenizer.decode(data.parts[0][0]["input_ids"]) == WORDS[:16]
    assert [batch["label"].tolist(), next(iter(foreign))["label"].tolist()] == [[0] * 4, [1] * 4]


def test_too_little_text_is_said(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(DataError, match=r"gives 1820 tokens, fewer than 2 blocks of data\.length=1000"):
        text(tmp_path, tiny_llama, length=1000)
    with pytest.raises(RecipeError, match="there is no such file or folder"):
        Text(str(tmp_path / "absent"), str(tiny_llama))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no text"):
        Text(str(tmp_path / "empty"), str(tiny_llama))
    with pytest.raises(RecipeError, match=r"data\.tokenizer has no value"):
        Text(str(tmp_path / "own.txt"), None)
    for length in (1, "abc"):  # one token predicts nothing
        with pytest.raises(RecipeError, match=rf"data\.length={length} is no such count"):
            text(tmp_path, tiny_llama, length=length)


def test_perplexity_is_the_exponential_of_the_models_own_loss(tmp_path: Path, tiny_llama: Path) -> None:
    model = hf(str(tiny_llama))
    data, task = text(tmp_path, tiny_llama, other=str(tmp_path / "other.txt")), LanguageModeling(other=True)
    metrics = task.metrics()
    losses: list[list[float]] = [[], []]
    with torch.no_grad():
        for loader in data.test_dataloader():
            for batch in loader:
                output = model(**task.inputs(batch)[1])
                loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.item()
                losses[batch["label"]].append(loss)
                assert task.loss(output, batch).item() == pytest.approx(loss, rel=1e-5)
                for metric in metrics.values():
                    metric.update(output, batch)
    own, other = (torch.tensor(part).mean() for part in losses)
    values = {name: metric.compute().item() for name, metric in metrics.items()}
    expected = {"loss_nats": own, "perplexity": own.exp(), "other_perplexity": other.exp()}
    assert values == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)


def test_uniform_guesses_cost_the_vocabulary() -> None:
    task = LanguageModeling()
    metric = task.metrics()["perplexity"]
    metric.update(torch.zeros(2, 5, 17), {"input_ids": torch.randint(0, 17, (2, 5))})
    assert metric.compute().item() == pytest.approx(17)


def test_disagreeing_texts_are_pointed_out() -> None:
    fp32 = {"perplexity": 10.0, "other_perplexity": 20.0}
    notices = LanguageModeling(other=True).notices
    assert not [*notices({"fp32": fp32, "simulated": {"perplexity": 12.0, "other_perplexity": 24.9}})]
    [warning] = notices({"fp32": fp32, "simulated": {"perplexity": 12.0, "other_perplexity": 28.0}})
    assert "simulated: perplexity is 1.2 times the float model's on data.path and 1.4 times" in warning
    assert not [*notices({"fp32": {"perplexity": 10.0}, "simulated": {"perplexity": 20.0}})]


def test_a_decoder_is_quantized_from_the_command_line(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text(tmp_path, tiny_llama)
    words = ["model=hf", f"model.path={tiny_llama}", "data=text", "data.path=own.txt", "data.length=64"]
    choices = ["experiment=weight_only_w4", "weight.granularity.group_size=32", "data.other=other.txt"]
    quick = ["evaluator=[accuracy]", "exporter=[safetensors]", "tracker=null", "out=run"]
    assert main([*words, *choices, *quick, "data.num_evaluation=4", "data.calibration.num_samples=4"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"perplexity", "loss_nats", "other_perplexity"} == {*report["metrics"]["simulated"]}
    assert report["edges"] == []
    names = [weight["name"] for weight in report["weights"]]
    assert names[0] == "model.embed_tokens:weight"
    assert not any("lm_head" in name or "norm" in name for name in names)  # tied: once
    assert main([*words, "tokenizer=x"]) == 2
    assert main(["model=hf", f"model.path={tmp_path}", *words[2:]]) == 2
    assert "neither a config.json" in capsys.readouterr().err


def test_a_decoder_is_one_proved_file_whose_head_and_rows_are_stored_once(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text(tmp_path, tiny_llama)
    words = ["model=hf", f"model.path={tiny_llama}", "data=text", "data.path=own.txt", "target=generic"]
    bits = ["weight.num_bits=4", "granularity@weight.granularity=subchannel", "activation=null"]
    quick = ["weight.granularity.group_size=16", "exporter=[onnx]", "evaluator=[]", "tracker=null", "out=run"]
    assert main([*words, *bits, *quick, "data.num_evaluation=4", "data.length=64"]) == 0
    [artifact] = json.loads((tmp_path / "run" / "report.json").read_text())["artifacts"]
    proof, linears = artifact["proof"], 2 * 7  # two blocks
    assert (proof["nodes"]["MatMulNBits"], proof["nodes"]["GatherBlockQuantized"]) == (linears + 1, 1)
    assert proof["layers"] == linears + 2  # the head and the rows are compared too
    assert proof["largest_layer_difference"] < 1e-5
    assert proof["samples"] == 4
    graph = onnx.load(tmp_path / "run" / artifact["path"]).graph
    stored = [t for t in graph.initializer if ".codes" in t.name]
    floats = 4 * sum(p.numel() for p in hf(str(tiny_llama)).parameters() if p.dim() == 2)
    scales = sum(math.prod(t.dims) for t in stored if t.name.endswith(".scale"))
    assert sum(len(t.raw_data) for t in stored) == floats / 8 + 4 * scales == floats / 8 + floats / 16
    assert len(stored) == 2 * (linears + 1)


def test_the_experiment_for_decoders_runs(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text(tmp_path, tiny_llama)
    words = ["model=hf", f"model.path={tiny_llama}", "data=text", "data.path=own.txt", "data.length=64"]
    choices = ["experiment=awq_w4", "weight.granularity.group_size=32", "data.num_evaluation=4"]
    quick = ["evaluator=[accuracy,sqnr,size]", "tracker=null", "out=run", "data.calibration.num_samples=4"]
    assert main([*words, *choices, *quick]) == 0
    metrics = json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    assert metrics["simulated"]["size_bytes"] < metrics["fp32"]["size_bytes"]
    assert metrics["simulated"]["sqnr_db"] > 0


def test_tied_weights_stay_tied(tmp_path: Path, tiny_llama: Path) -> None:
    import qpipe

    quantized, _ = qpipe.quantize(
        hf(str(tiny_llama)),
        text(tmp_path, tiny_llama, num_calibration=2, num_evaluation=2),
        task=LanguageModeling(),
        target="generic",
        activation=None,
        evaluator=[],
        num_samples=2,
    )
    assert isinstance(quantized, nn.Module)
    assert quantized.lm_head._parameters["weight"] is quantized.model.embed_tokens._parameters["weight"]
    assert quantized.lm_head.weight_quantizer is quantized.model.embed_tokens.weight_quantizer


@pytest.mark.parametrize("name", ["smoothquant", "awq", "rotate"])
def test_transforms_keep_a_llama_and_its_codes_are_stored(
    name: str, tmp_path: Path, tiny_llama: Path
) -> None:
    import qpipe

    data = text(tmp_path, tiny_llama, num_calibration=4, num_evaluation=4)
    model, tokens = hf(str(tiny_llama)), {"input_ids": data.parts[1][0]["input_ids"][None]}
    quantized, report = qpipe.quantize(
        model,
        data,
        task=LanguageModeling(),
        target="generic",
        transform=[name],
        weight={"num_bits": 4},
        layers=[{"match": "*embed_tokens", "weight": None}, {"match": "lm_head", "weight": None}],
        activation=None,
        evaluator=[],
        exporter=["safetensors"],
        out=tmp_path / "run",
    )
    assert report.artifacts[0].proof["bit_equal"]
    with disabled(quantized), torch.no_grad():
        torch.testing.assert_close(quantized(**tokens).logits, model(**tokens).logits, rtol=1e-3, atol=1e-4)
    assert bool((quantized.model.norm.weight == 1).all()) == (name == "rotate")

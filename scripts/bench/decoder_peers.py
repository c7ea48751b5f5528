"""Weight-only quantization of a decoder by other packages, on the model and the texts of decoder.py.

    python scripts/bench/decoder.py --make FOLDER          # the model and the tokens, once
    pip install hqq==0.2.8.post1 torchao==0.18.0 auto-round==0.16.1 llmcompressor==0.14.0.1   # or some
    pip install --no-deps gptqmodel==7.7.0                 # it asks for torch 2.14.1 and runs with 2.13
    python scripts/bench/decoder_peers.py FOLDER --peers llmcompressor-gptq --rows "w4 symmetric"

Every peer quantizes the linear layers of the blocks in groups of 64, calibrates on the same 16 blocks of 256
tokens, and is evaluated by decoder.py's perplexity. Settings are the package's own but where a name says
otherwise. One thread.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from decoder import LENGTH, SETTINGS, perplexity, report
from torch import Tensor, nn

Setting = Mapping[str, Any]


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def tokenizer(folder: str) -> Any:  # noqa: ANN401
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def is_symmetric(setting: Setting) -> bool:
    return bool(setting.get("symmetric", True))


def hqq_weight(weight: Tensor, num_bits: int) -> Tensor:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=num_bits, group_size=64, axis=1, optimize=True, round_zero=False, device="cpu",
        compute_dtype=torch.float32, bitpack=False,
    )  # fmt: skip
    result: Tensor = Quantizer.dequantize(codes, meta)
    return result.float().reshape(weight.shape)


def torchao_weight(weight: Tensor, num_bits: int, symmetric: bool) -> Tensor:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    low, high = (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1) if symmetric else (0, 2**num_bits - 1)
    dtype = torch.int8 if symmetric else torch.uint8
    scale, zero = choose_qparams_affine(weight, mapping, (1, 64), dtype, low, high, eps=1e-6)
    codes = quantize_affine(weight, (1, 64), scale, zero, dtype, low, high)
    result: Tensor = dequantize_affine(
        codes, (1, 64), scale, zero, dtype, low, high, output_dtype=torch.float32
    )
    return result


def rounded(folder: str, found: Callable[[Tensor], Tensor]) -> nn.Module:
    model = load(folder)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight.data.copy_(found(module.weight.detach()))
    return model


def hqq(folder: str, setting: Setting, calibration: Tensor) -> nn.Module:
    return rounded(folder, lambda weight: hqq_weight(weight, setting["num_bits"]))


def torchao(folder: str, setting: Setting, calibration: Tensor) -> nn.Module:
    bits, symmetric = setting["num_bits"], is_symmetric(setting)
    return rounded(folder, lambda weight: torchao_weight(weight, bits, symmetric))


def autoround(folder: str, setting: Setting, calibration: Tensor) -> nn.Module:
    from auto_round import AutoRound

    tokens = [{"input_ids": x[None], "attention_mask": torch.ones_like(x)[None]} for x in calibration]
    rounder = AutoRound(
        load(folder), tokenizer(folder), bits=setting["num_bits"], group_size=64, sym=is_symmetric(setting),
        iters=20, nsamples=len(calibration), seqlen=LENGTH, dataset=tokens, batch_size=4, device_map="cpu",
        amp=False, enable_torch_compile=False,
    )  # fmt: skip
    model, _ = rounder.quantize()
    result: nn.Module = model.float()
    return result


def llmcompressor(folder: str, setting: Setting, calibration: Tensor, method: str) -> nn.Module:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier, SpinQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *args: None  # AWQ pins always, which raises without an accelerator

    weights = {
        "num_bits": setting["num_bits"], "type": "int", "symmetric": is_symmetric(setting),
        "strategy": "group", "group_size": 64,
    }  # fmt: skip
    scheme = {
        "config_groups": {"blocks": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    recipe: dict[str, list[Any]] = {
        "gptq": [GPTQModifier(**scheme)],
        "awq": [AWQModifier(), QuantizationModifier(**scheme)],
        "rotation": [
            SpinQuantModifier(rotations=["R1"], transform_type="random-hadamard"),
            QuantizationModifier(**scheme),
        ],
    }
    tokens = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    model = load(folder)
    oneshot(
        model=model, processor=tokenizer(folder), dataset=Dataset.from_dict(tokens), recipe=recipe[method],
        num_calibration_samples=len(calibration), max_seq_length=LENGTH,
    )  # fmt: skip
    return model


def gptqmodel(folder: str, setting: Setting, calibration: Tensor) -> nn.Module:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it raises where its own count, half the cores, is 1
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch._dynamo.config.disable = True  # it would compile each of the 210 layers, for a few calls
    config = QuantizeConfig(
        bits=setting["num_bits"], group_size=64, sym=is_symmetric(setting), device="cpu",
        offload_to_disk=False,
    )  # fmt: skip
    model = GPTQModel.load(folder, config)
    model.quantize([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in calibration])
    with TemporaryDirectory() as saved:
        model.save(saved)
        result: nn.Module = GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH).model
    return result.float()


PEERS: dict[str, Callable[[str, Setting, Tensor], nn.Module]] = {
    "torchao": torchao,
    "hqq": hqq,
    "auto-round": autoround,
    "llmcompressor-gptq": lambda *args: llmcompressor(*args, method="gptq"),
    "llmcompressor-awq": lambda *args: llmcompressor(*args, method="awq"),
    "llmcompressor-rotation": lambda *args: llmcompressor(*args, method="rotation"),
    "gptqmodel": gptqmodel,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what decoder.py --make wrote")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS], required=True)
    parser.add_argument("--rows", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = torch.load(Path(args.folder) / "blocks.pt", weights_only=True)
    floats = [perplexity(load(args.folder), part) for part in parts[1:]]
    for peer in args.peers:
        for row in args.rows:
            if peer == "hqq" and is_symmetric(SETTINGS[row]):
                print(f"{row}, hqq: its zero is real, symmetric codes have none")
                continue
            start = time.process_time()
            model = PEERS[peer](args.folder, SETTINGS[row], parts[0])
            report(f"{row}, {peer}", model, parts, floats, time.process_time() - start)


if __name__ == "__main__":
    main()

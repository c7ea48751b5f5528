"""MiniLM in eight and four bits, executed by ONNX Runtime: cosine to float, and CPU time beside float32.

    python scripts/bench/minilm.py                  # every row, a table to paste
    python scripts/bench/minilm.py --rows dynamic   # rows whose name holds one of these words

Cosine is the mean over sentences never calibrated on, of the file's embeddings to those of the float model;
times are process CPU time of one thread, medians of rounds taken in turns. Bars: cosine 0.99, 1.5 times fp32.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from qpipe_onnx._runtime import OnnxRuntimeModule
from qpipe_onnx._trace import trace, write
from qpipe_zoo.data.sentences import Sentences
from qpipe_zoo.model.minilm import minilm
from torch import Tensor, nn

from qpipe import Task, load, quantize
from qpipe.calls import Call, indexed

TENSOR = {"dynamic": True}
TOKEN = {"dynamic": True, "symmetric": True, "signed": True, "granularity": "token"}
STATIC: dict[str, Any] = {"target": "x86_linear", "activation": {"calibrator": "mse"}}
W4: dict[str, Any] = {
    "target": "generic",
    "activation": None,
    "weight": {"num_bits": 4},
    "granularity": {"name": "subchannel", "group_size": 64},
}
ROWS: dict[str, dict[str, Any]] = {
    "static, ranges of least squared error": STATIC,
    "dynamic, a range a tensor": {"target": "x86_linear", "activation": TENSOR},
    "dynamic, a range a tensor, weights of least squared error": {
        "target": "x86_linear",
        "activation": TENSOR,
        "weight": {"calibrator": "mse"},
    },
    "dynamic, a range a token": {"target": "x86_linear", "activation": TOKEN},
    "four bits, products in float32": W4,
    "four bits, exporter.onnx.accuracy_level=4": {**W4, "accuracy_level": 4},
}
SHAPES = {"8 sentences of 128 tokens": (8, 128), "one of 16": (1, 16)}


def float_file(model: nn.Module, call: Call, path: Path) -> nn.Module:
    graph = trace(model, call, opset=21)
    write(graph, path, {})
    return OnnxRuntimeModule(path, [*call[1]], indexed(model(*call[0], **call[1])))


def exported(
    model: nn.Module, data: Sentences, choices: dict[str, Any], out: Path
) -> tuple[nn.Module, float]:
    """Return the file in ONNX Runtime, and its megabytes."""
    level = {"accuracy_level": choices["accuracy_level"]} if "accuracy_level" in choices else {}
    exporter = {"name": "onnx", "samples": 16, "compare_fp32": False, **level}
    words = {key: value for key, value in choices.items() if key != "accuracy_level"}
    quantize(model, data, task=Task(), out=out, transform=[], evaluator=[], exporter=[exporter], **words)
    return load(out), next(out.rglob("*.onnx")).stat().st_size / 1e6


def embeddings(module: nn.Module, batches: list[Any]) -> Tensor:
    calls = [Task().inputs(batch) for batch in batches]
    with torch.no_grad():
        return torch.cat([Task().compared(module(*args, **kwargs)) for args, kwargs in calls])


def cpu_ms(modules: dict[str, nn.Module], call: Call, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds + 1):
        for name, module in modules.items():
            start = time.process_time()
            module(*call[0], **call[1])
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--evaluation", type=int, default=128, help="sentences the cosine is taken over")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, data = minilm().eval(), Sentences(num_evaluation=chosen.evaluation)
    data.setup()
    batches = [*data.test_dataloader()]
    reference = embeddings(model, batches)
    calls: dict[str, Call] = {}
    for name, (count, length) in SHAPES.items():
        part = Sentences(batch_size=count, length=length, num_evaluation=count)
        part.setup()
        calls[name] = Task().inputs(next(iter(part.test_dataloader())))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        modules = {"fp32": float_file(model, Task().inputs(batches[0]), folder / "fp32.onnx")}
        megabytes = {"fp32": (folder / "fp32.onnx").stat().st_size / 1e6}
        for index, (row, choices) in enumerate(ROWS.items()):
            if any(word in row for word in chosen.rows):
                modules[row], megabytes[row] = exported(model, data, choices, folder / str(index))
        cosines = {
            row: torch.cosine_similarity(embeddings(module, batches), reference).mean().item()
            for row, module in modules.items()
        }
        times = {shape: cpu_ms(modules, call, chosen.rounds) for shape, call in calls.items()}
    heads = " | ".join(f"CPU ms, {shape}" for shape in SHAPES)
    print(f"| recipe | cosine | {heads} | times fp32's speed | MB |")
    print("|---|--:|" + "--:|" * (len(SHAPES) + 2))
    first = next(iter(SHAPES))
    for row in modules:
        taken = " | ".join(f"{times[shape][row]:.1f}" for shape in SHAPES)
        ratio = times[first]["fp32"] / times[first][row]
        print(f"| {row} | {cosines[row]:.4f} | {taken} | {ratio:.2f} | {megabytes[row]:.1f} |")


if __name__ == "__main__":
    main()

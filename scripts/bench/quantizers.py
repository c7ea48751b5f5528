"""Every quantizer on the weights of two networks that tell them apart, activations in floating point.

    python scripts/bench/quantizers.py                    # every row, a table to paste
    python scripts/bench/quantizers.py --rows nf4 log     # rows whose words hold one of these

MiniLM: mean cosine of 128 sentence embeddings to float. EfficientNet-Lite0: SQNR of the logits and agreement
with float on 64 crops, stem and classifier kept at 8 uniform bits; from 4 bits up. Simulated; one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from qpipe_zoo.data.photos import Photos
from qpipe_zoo.data.sentences import Sentences
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from qpipe_zoo.model.minilm import minilm
from torch import Tensor, nn

from qpipe import Task, quantize

Choices = dict[str, Any]
AFFINE = {"symmetric": False, "signed": False, "restricted": False}
ENDS = [
    {"match": name, "weight": {"quantizer": "uniform", "num_bits": 8, "granularity": "channel"}}
    for name in ("stem*", "fc*")
]


def blocks(size: int) -> Choices:
    """Return groups of inputs; EfficientNet's are no multiple of them."""
    return {"granularity": {"name": "subchannel", "group_size": size, "pad": True}}


def rows() -> Iterator[Choices]:
    for name, bits in (("uniform", 8), ("fp8_e4m3", 8), ("fp8_e5m2", 8)):
        yield {"quantizer": name, "weight": {"num_bits": bits}}
    for name, size, bits in (("mxint8", 32, 8), ("mxfp8", 32, 8), ("mxfp6", 32, 6), ("mxfp4", 32, 4)):
        yield {"quantizer": name, "weight": {"num_bits": bits}, **blocks(size)}
    yield {"quantizer": "nvfp4", "weight": {"num_bits": 4}, **blocks(16)}
    yield {"quantizer": "nf4", "weight": {"num_bits": 4}, **blocks(64)}
    double = {"name": "nf4", "double_quantization": True}
    yield {"quantizer": double, "weight": {"num_bits": 4}, **blocks(64)}
    yield {"quantizer": "dorefa", "weight": {"num_bits": 4}, **blocks(64)}
    yield {"quantizer": "ternary", "weight": {"num_bits": 2}, **blocks(64)}
    yield {"quantizer": {"name": "ternary", "exact": True}, "weight": {"num_bits": 2}, **blocks(64)}
    yield {"quantizer": "binary", "weight": {"num_bits": 1}, **blocks(64)}
    for dim, bits in ((4, 8), (8, 8)):  # 2 bits and 1 bit a weight
        vector = {"name": "vector", "dim": dim, "starts": 1, "max_iterations": 10}
        yield {"quantizer": vector, "weight": {"num_bits": bits}, "granularity": "layer"}
    for bits in (4, 2, 3):
        yield {"quantizer": "uniform", "weight": {"num_bits": bits}, **blocks(64)}
        yield {"quantizer": "mse", "weight": {"num_bits": bits}, **blocks(64)}
        yield {"quantizer": "uniform", "weight": {"num_bits": bits, **AFFINE}, **blocks(64)}
        for name in ("log", "apot", "codebook", "lq", "binary_code"):
            yield {"quantizer": name, "weight": {"num_bits": bits}, **blocks(64)}


def words(choices: Choices) -> str:
    """Return the command line's words for one row."""
    weight = [f"weight.{key}={_word(value)}" for key, value in choices["weight"].items()]
    others = [f"{key}={_word(value)}" for key, value in choices.items() if key != "weight"]
    return " ".join([*others, *weight])


def _word(value: Any) -> str:  # noqa: ANN401  # what yaml holds
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(part)}" for key, part in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


class Network:
    """A model, its evaluation batches and what it answers in floating point."""

    def __init__(self, model: nn.Module, data: LightningDataModule, fixed: Choices) -> None:
        self.model = model
        self.data = data
        self.fixed = fixed
        data.setup("test")
        self.batches = list(data.test_dataloader())
        self.reference = self.outputs(model)

    def outputs(self, model: nn.Module) -> Tensor:
        task = Task()
        with torch.no_grad():
            calls = [task.inputs(batch) for batch in self.batches]
            return torch.cat([model(*args, **kwargs) for args, kwargs in calls])

    def measure(self, choices: Choices) -> tuple[dict[str, float], float]:
        """Return the figures of one row, and its size over that in float32."""
        quantized, report = quantize(
            self.model,
            self.data,
            target="generic",
            evaluator=["size"],
            activation=None,
            **self.fixed,
            **choices,
        )
        output, reference = self.outputs(quantized), self.reference
        noise = (output - reference).square().sum()
        figures = {
            "cosine": torch.cosine_similarity(output, reference).mean().item(),
            "sqnr_db": 10 * torch.log10(reference.square().sum() / noise).item(),
            "agreement": (output.argmax(1) == reference.argmax(1)).float().mean().item(),
        }
        return figures, report.metrics["simulated"]["size_bytes"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sentences = Network(minilm(), Sentences(batch_size=128, num_evaluation=128), {"transform": []})
    photos = Network(
        efficientnet_lite0(), Photos(batch_size=16, num_calibration=4, num_evaluation=64), {"layers": ENDS}
    )
    print("| words | MiniLM MiB | cosine | EfficientNet-Lite0 SQNR dB | agreement | CPU s |")
    print("|---|--:|--:|--:|--:|--:|")
    for choices in rows():
        if not any(word in words(choices) for word in args.rows):
            continue
        start = time.process_time()
        text, size = sentences.measure(choices)
        seen = "| - | - "
        if choices["weight"]["num_bits"] >= 4 and "vector" not in words(
            choices
        ):  # below, rounding to nearest leaves nothing to compare
            image, _ = photos.measure(choices)
            seen = f"| {image['sqnr_db']:.1f} | {image['agreement']:.2f} "
        spent = time.process_time() - start
        print(
            f"| `{words(choices)}` | {size:.1f} | {text['cosine']:.4f} {seen}| {spent:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

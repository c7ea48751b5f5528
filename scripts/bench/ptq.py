"""Post-training methods beside rounding to nearest: one row a recipe, with its CPU time (quantize() alone).

    python scripts/bench/ptq.py                                   # every row, 256 evaluation crops
    python scripts/bench/ptq.py --rows w4 minilm --evaluation 64  # rows whose name holds one of these words

EfficientNet-Lite0: SQNR of the logits and agreement with float, on crops of photos never calibrated
on; 'synthetic' and 'noise' calibrate on no photo at all. MiniLM: mean cosine of sentence embeddings to
float. All figures are simulated; one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from qpipe_zoo.data.photos import Photos
from qpipe_zoo.data.sentences import Sentences
from qpipe_zoo.data.synthetic import Synthetic
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from qpipe_zoo.model.minilm import minilm
from torch import Tensor, nn

from qpipe import Task, quantize

GPTQ = {"name": "gptq", "match": "float"}
SHRUNK = {"name": "gptq", "shrinkage": 0.2}
ANALYTIC = {"name": "bias_correction", "source": "batch_norm"}
CLIPPED = {"calibrator": "percentile"}
EQUALIZE = ["fold_bn", "equalize"]
RANGES = ["fold_bn", {"name": "equalize", "objective": "ranges", "steps": 20}]
ENDS = [{"match": name, "weight": {"num_bits": 8}} for name in ("stem*", "fc*")]
DEPTHWISE = [*ENDS, {"match": "*depthwise*", "weight": {"num_bits": 8}}]
W4: dict[str, Any] = {"weight": {"num_bits": 4}, "layers": ENDS}
W4_FULL: dict[str, Any] = {
    "weight": {"num_bits": 4, "restricted": False},
    "layers": [{**end, "weight": {"num_bits": 8, "restricted": True}} for end in ENDS],
}
W4_DEPTHWISE_8: dict[str, Any] = {"weight": {"num_bits": 4}, "layers": DEPTHWISE}

BLOCKS = {"name": "brecq", "iterations": 100, "step_lr": 0.0}

PHOTOS: dict[str, dict[str, Any]] = {
    "w8 channel, round": {},
    "w8 channel, bias_correction": {"finetune": ["bias_correction"]},
    "w8 channel, gptq": {"finetune": [SHRUNK]},
    "w8 channel, gptq, synthetic": {"finetune": [SHRUNK], "data": "synthetic"},
    "w8 channel, gptq, noise": {"finetune": [SHRUNK], "data": "noise"},
    "w8 channel, percentile": CLIPPED,
    "w8 channel, percentile, synthetic": {**CLIPPED, "data": "synthetic"},
    "w8 channel, percentile, noise": {**CLIPPED, "data": "noise"},
    "w8 channel, percentile, analytic, synthetic": {**CLIPPED, "finetune": [ANALYTIC], "data": "synthetic"},
    "w8 channel, percentile, analytic, noise": {**CLIPPED, "finetune": [ANALYTIC], "data": "noise"},
    "w8 tensor, round": {"granularity": "layer"},
    "w8 tensor, equalize ranges, bias_correction": {
        "granularity": "layer",
        "transform": RANGES,
        "finetune": ["bias_correction"],
    },
    "w8 tensor, equalize ranges, analytic bias_correction": {
        "granularity": "layer",
        "transform": RANGES,
        "finetune": [ANALYTIC],
    },
    "w8 tensor, equalize, gptq": {"granularity": "layer", "transform": EQUALIZE, "finetune": [SHRUNK]},
    "w4 channel, round": W4,
    "w4 channel, equalize, bias_correction": {**W4, "transform": EQUALIZE, "finetune": ["bias_correction"]},
    "w4 channel, equalize, seqmse": {**W4, "transform": EQUALIZE, "finetune": ["seqmse"]},
    "w4 channel, equalize, gptq": {**W4, "transform": EQUALIZE, "finetune": [SHRUNK]},
    "w4 channel, full range, round": W4_FULL,
    "w4 channel, full range, equalize, gptq": {**W4_FULL, "transform": EQUALIZE, "finetune": [SHRUNK]},
    "w4 channel, equalize, adaround": {**W4, "transform": EQUALIZE, "finetune": ["adaround"]},
    "w4 channel, equalize, autoround": {**W4, "transform": EQUALIZE, "finetune": ["autoround"]},
    "w4 channel, gptq": {**W4, "finetune": [SHRUNK]},
    "w4 channel, gptq, synthetic": {**W4, "finetune": [SHRUNK], "data": "synthetic"},
    "w4 channel, gptq, noise": {**W4, "finetune": [SHRUNK], "data": "noise"},
    "w4 channel, brecq, qdrop": {**W4, "finetune": [BLOCKS]},
    "w4 channel, brecq": {**W4, "finetune": [{**BLOCKS, "drop": 0.0}]},
    "w4 channel, gptq, brecq, qdrop": {**W4, "finetune": [SHRUNK, BLOCKS]},
    "w4 channel, depthwise 8, equalize, gptq": {
        **W4_DEPTHWISE_8,
        "transform": EQUALIZE,
        "finetune": [SHRUNK],
    },
}
G64: dict[str, Any] = {
    "activation": None,
    "granularity": {"name": "subchannel", "group_size": 64},
    "transform": [],
}
S4: dict[str, Any] = {**G64, "weight": {"num_bits": 4}}
A3: dict[str, Any] = {
    **G64,
    "weight": {"num_bits": 3, "symmetric": False, "signed": False, "restricted": False},
}
SENTENCES: dict[str, dict[str, Any]] = {
    f"minilm {bits} g64, {name}": {**choices, "finetune": finetune}
    for bits, choices in (("w4 symmetric", S4), ("w3 asymmetric", A3))
    for name, finetune in (
        ("round", []),
        ("seqmse", ["seqmse"]),
        ("gptq as published", ["gptq"]),
        ("gptq", [GPTQ]),
        ("adaround", ["adaround"]),
        ("autoround", ["autoround"]),
    )
}
for bits, choices in (("w4 symmetric", S4), ("w3 asymmetric", A3)):
    SENTENCES[f"minilm {bits} g64, awq"] = {**choices, "transform": ["awq"]}
    SENTENCES[f"minilm {bits} g64, awq, gptq"] = {**choices, "transform": ["awq"], "finetune": [GPTQ]}
for num_bits in (4, 3):
    for codes, restricted in (("restricted", True), ("full", False)):
        ranged = {**G64, "weight": {"num_bits": num_bits, "restricted": restricted}}
        for name, finetune in (("round", []), ("gptq as published", ["gptq"]), ("gptq", [GPTQ])):
            SENTENCES[f"minilm w{num_bits} g64, {codes} range, {name}"] = {**ranged, "finetune": finetune}
A4 = {**A3, "weight": {**A3["weight"], "num_bits": 4}}
for bits, choices in (("w4 asymmetric", A4), ("w3 asymmetric", A3)):
    SENTENCES[f"minilm {bits} g64, round"] = choices
    SENTENCES[f"minilm {bits} g64, hqq"] = {**choices, "weight": {**choices["weight"], "quantizer": "hqq"}}


def outputs(model: nn.Module, batches: list[Any]) -> Tensor:
    task = Task()
    with torch.no_grad():
        calls = [task.inputs(batch) for batch in batches]
        return torch.cat([model(*args, **kwargs) for args, kwargs in calls])


def compared(output: Tensor, reference: Tensor, is_photos: bool) -> Mapping[str, float]:
    if not is_photos:
        return {"cosine": torch.cosine_similarity(output, reference).mean().item()}
    noise = (output - reference).square().sum()
    return {
        "sqnr_db": 10 * torch.log10(reference.square().sum() / noise).item(),
        "agreement": (output.argmax(1) == reference.argmax(1)).float().mean().item(),
    }


def run(
    rows: Mapping[str, dict[str, Any]],
    model: nn.Module,
    sources: Mapping[str, LightningDataModule],
    is_photos: bool,
) -> None:
    """Print a row for each recipe, calibrated on the source it names, by default the first."""
    default, data = next(iter(sources.items()))
    data.setup("test")
    batches = list(data.test_dataloader())
    reference = outputs(model, batches)
    for name, choices in rows.items():
        source = sources[choices.get("data", default)]
        choices = {key: value for key, value in choices.items() if key != "data"}
        start = time.process_time()
        target = "x86" if is_photos else "generic"
        quantized, _ = quantize(model, source, target=target, evaluator=[], num_samples=128, **choices)
        spent = time.process_time() - start
        figures = compared(outputs(quantized, batches), reference, is_photos)
        text = "  ".join(f"{key} {value:7.3f}" for key, value in figures.items())
        print(f"{name:48s} {text}  {spent:5.0f} CPU s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""])
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--evaluation", type=int, default=256)
    parser.add_argument("--distillation", type=int, default=100, help="iterations a batch of 'synthetic'")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def chosen(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: row for name, row in rows.items() if any(word in name for word in args.rows)}

    if photos := chosen(PHOTOS):
        model, count = efficientnet_lite0(), args.calibration
        sources = {
            "photos": Photos(num_calibration=count, num_evaluation=args.evaluation),
            "synthetic": Synthetic(model, (3, 224, 224), count=count, iterations=args.distillation),
            "noise": Synthetic(model, (3, 224, 224), count=count, iterations=0),
        }
        run(photos, model, sources, True)
    if sentences := chosen(SENTENCES):
        run(sentences, minilm(), {"sentences": Sentences(num_calibration=args.calibration)}, False)


if __name__ == "__main__":
    main()

"""EfficientNet-Lite0 in W4A8: how far what 28 photos teach carries over to ten others.

    python scripts/bench/w4.py     # about 150 CPU s a row

The recipe of `data.source=both experiment=w4_ptq` on 256 crops. Judged on 56 of those crops and on the 256
crops of `data=photos` that evaluate: SQNR, agreement, and of the latter the share of the error that all crops
of a photo have in common; simulated.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from qpipe_zoo.data.photos import SOURCES, Crops, read_photo
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from torch import Tensor, nn

from qpipe import quantize

EIGHT = {"num_bits": 8, "symmetric": True, "signed": True, "restricted": True}
ENDS = [{"match": name, "weight": EIGHT} for name in ("stem*", "fc*")]
WEIGHT = {"num_bits": 4, "calibrator": "mse", "symmetric": False, "signed": False, "restricted": False}
PRESET = {
    "name": "gptq",
    "match": "float",
    "ridge": 1.0,
    "shrinkage": 0.2,
    "scales": 6,
    "num_samples": 256,
    "memory_gb": 8.0,
}
ROWS: dict[str, dict[str, Any]] = {
    "w4_ptq": {},
    "w4_ptq, other crops": {"crops": 2},
    "w4_ptq, other crops again": {"crops": 3},
    "every second photo": {"photos": 2},
    "every fourth photo": {"photos": 4},
    "every eighth photo": {"photos": 8},
    "ridge 0.1": {"ridge": 0.1},
    "ridge 10": {"ridge": 10.0},
    "shrinkage 0": {"shrinkage": 0.0},
    "shrinkage 0.5": {"shrinkage": 0.5},
    "match layer": {"match": "layer"},
}


def crops(photos: list[Tensor], count: int, seed: int) -> Tensor:
    data = Crops(photos, count, 224, seed)
    return torch.stack([data[i] for i in range(count)])


@torch.no_grad()
def figures(model: nn.Module, reference: nn.Module, x: Tensor, num_photos: int) -> tuple[float, float, float]:
    """Return SQNR in dB, agreement, and the share of the error that all crops of a photo have in common."""
    y, expected = (torch.cat([m(part) for part in x.split(16)]) for m in (model, reference))
    error = y - expected
    decibels = 10 * torch.log10(expected.square().sum() / error.square().sum()).item()
    by_photo = [error[i::num_photos] for i in range(num_photos)]
    constant = sum(len(e) * e.mean(0).square().sum().item() for e in by_photo)
    agreement = (y.argmax(1) == expected.argmax(1)).float().mean().item()
    return decibels, agreement, constant / error.square().sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="ROW")
    rows = parser.parse_args().rows
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seen, others = ([read_photo(name) for name in names] for names in SOURCES["both"])
    model = efficientnet_lite0()
    judged = crops(others, 256, 1)
    print(f"{'':28s} photos seen      ten others         in common")
    for name in rows:
        choices = dict(ROWS[name])
        photos = seen[:: choices.pop("photos", 1)]
        calibration = crops(photos, 256, choices.pop("crops", 0))
        start = time.process_time()
        quantized, _ = quantize(
            model,
            [*calibration.split(16)],
            target="x86",
            weight=WEIGHT,
            layers=ENDS,
            transform=["fold_bn", "equalize"],
            finetune=[{**PRESET, **choices}],
            evaluator=[],
        )
        spent = time.process_time() - start
        near = figures(quantized, model, calibration[:56], len(photos))
        far = figures(quantized, model, judged, len(others))
        print(
            f"{name:28s} {near[0]:5.2f} dB {near[1]:.3f}   {far[0]:5.2f} dB {far[1]:.3f}   {far[2]:.2f}"
            f"   {spent:4.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""EfficientNet-Lite0 in W4A8 on photos held out of the calibration ones: which recipe generalises.

    python scripts/bench/w4.py     # 64 varied crops of 16 photos calibrate, about 75 CPU s a row

SQNR and agreement on 16 plain crops of the 16 photos that were seen and on 48 of 4 that were not; simulated.
The photos of `data=photos` that evaluate take no part.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from qpipe_zoo.data.photos import IMAGENET, Crops, read_photo
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from torch import Tensor, nn

from qpipe import quantize

HELD = (3, 8, 13, 18)
EIGHT = {"num_bits": 8, "symmetric": True, "signed": True, "restricted": True}
ENDS = [{"match": name, "weight": EIGHT} for name in ("stem*", "fc*")]
WEIGHT = {"num_bits": 4, "calibrator": "mse", "symmetric": False, "signed": False, "restricted": False}
ROWS: dict[str, dict[str, Any]] = {
    "ridge 0.03": {"ridge": 0.03},
    "ridge 0.1": {},
    "ridge 1 (experiment=w4_ptq)": {"ridge": 1.0},
    "ridge 1, shrinkage 0.5": {"ridge": 1.0, "shrinkage": 0.5},
    "ridge 3": {"ridge": 3.0},
}


def crops(photos: list[Tensor], count: int, seed: int, varied: bool = False) -> Tensor:
    data = Crops(photos, count, 224, seed, varied)
    return torch.stack([data[i] for i in range(count)])


@torch.no_grad()
def figures(model: nn.Module, reference: nn.Module, x: Tensor) -> str:
    y, expected = (torch.cat([m(part) for part in x.split(8)]) for m in (model, reference))
    decibels = 10 * torch.log10(expected.square().sum() / (y - expected).square().sum()).item()
    agreement = (y.argmax(1) == expected.argmax(1)).float().mean().item()
    return f"{decibels:6.2f} dB {agreement:6.3f}"


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    photos = [read_photo(name) for name in IMAGENET]
    seen = [photo for i, photo in enumerate(photos) if i not in HELD]
    model = efficientnet_lite0()
    judged = {"seen": crops(seen, 16, 11), "held out": crops([photos[i] for i in HELD], 48, 12)}
    batches = [*crops(seen, 64, 0, varied=True).split(8)]
    for name, choices in ROWS.items():
        gptq = {"name": "gptq", "match": "float", "shrinkage": 0.2, "scales": 6, **choices}
        start = time.process_time()
        quantized, _ = quantize(
            model,
            batches,
            target="x86",
            weight=WEIGHT,
            layers=ENDS,
            transform=["fold_bn", "equalize"],
            finetune=[gptq],
            evaluator=[],
        )
        spent = time.process_time() - start
        text = "  ".join(f"{key} {figures(quantized, model, x)}" for key, x in judged.items())
        print(f"{name:30s} {text}  {spent:5.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()

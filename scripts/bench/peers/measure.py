"""Quantize EfficientNet-Lite0 with one tool and measure it; run by peers.py in the tool's environment.

`python measure.py DRIVER TENSORS RESULT`. A driver is a module with `load()`, which imports the tool and
returns its version, and `VARIANTS`: of each name a function (model, calibration crops, folder) -> Quantized.
"""

from __future__ import annotations

import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0

ROUNDS, CALLS = 5, {1: 4, 32: 1}


@dataclass
class Quantized:
    """What a tool made.

    Args:
        run: crops [B, 3, 224, 224] to logits.
        edges: activations it quantizes; None where the tool does not say.
        engine: what executes the integers; '' where they are simulated in floating point.
    """

    run: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
    edges: int | None
    engine: str = ""


def eager(model: torch.nn.Module) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def run(crops: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return model(torch.from_numpy(crops)).numpy()

    return run


def judge(
    quantized: Quantized, crops: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]
) -> dict[str, float]:
    logits = np.concatenate([quantized.run(crops[i : i + 16]) for i in range(0, len(crops), 16)])
    noise = np.square(logits - reference).sum()
    return {
        "sqnr_db": float(10 * np.log10(np.square(reference).sum() / noise)),
        "agreement": float((logits.argmax(1) == reference.argmax(1)).mean()),
    }


def latency(quantized: Quantized, crops: np.ndarray[Any, Any]) -> dict[str, float]:
    """CPU milliseconds an image, one thread, median of rounds."""
    found = {}
    for size, calls in CALLS.items():
        batch, times = np.resize(crops, (size, *crops.shape[1:])), []
        quantized.run(batch)
        for _ in range(ROUNDS):
            start = time.process_time()
            for _ in range(calls):
                quantized.run(batch)
            times.append(1e3 * (time.process_time() - start) / calls / size)
        found[f"cpu_ms_b{size}"] = statistics.median(times)
    return found


def measured(make: Any, crops: Any, folder: Path) -> dict[str, Any]:  # noqa: ANN401
    model = efficientnet_lite0().eval()
    start = time.process_time()
    quantized = make(model, torch.from_numpy(crops["calibration"]), folder)
    cost = time.process_time() - start
    return {
        "edges": quantized.edges,
        "engine": quantized.engine,
        "calibration_cpu_s": cost,
        **judge(quantized, crops["evaluation"], crops["reference"]),
        **latency(quantized, crops["evaluation"]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    driver, tensors, result = sys.argv[1:4]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    crops = dict(np.load(tensors))
    module = importlib.import_module(f"drivers.{driver}")
    start = time.process_time()
    version = module.load()
    rows: dict[str, Any] = {"peer": driver, "version": version, "import_cpu_s": time.process_time() - start}
    rows["variants"] = {}
    for name in sys.argv[4:] or module.VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows["variants"][name] = measured(module.VARIANTS[name], crops, Path(folder))
            except Exception as error:
                traceback.print_exc()
                rows["variants"][name] = {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        Path(result).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

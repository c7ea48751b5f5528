"""EfficientNet-Lite0, W8A8 per channel, executed by ONNX Runtime: qpipe beside its own quantize_static.

Both calibrate on the same crops and are judged on the same others; times are process CPU time, one thread,
measured in turns. quantize_static gives its entropy search 128 bins for 128 levels and no way to ask for
more, so here it ends where min-max does. `python scripts/bench/efficientnet.py` takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from qpipe_zoo.data.photos import Photos
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0

import qpipe

THEIRS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
CALIBRATORS = ("minmax", "percentile", "kl", "mse")
SIZES = {1: 20, 32: 1}  # batch size: calls a round


class Crops(CalibrationDataReader):
    def __init__(self, name: str, crops: torch.Tensor) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([{name: crop.numpy()} for crop in crops.split(1)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(runtime: onnxruntime.InferenceSession, crops: torch.Tensor) -> np.ndarray[Any, Any]:
    name = runtime.get_inputs()[0].name
    return np.concatenate([runtime.run(None, {name: part.numpy()})[0] for part in crops.split(16)])


def export_float(model: torch.nn.Module, crops: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(
        model.eval(), (crops[:2],), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
    )
    program.save(path.with_suffix(".raw.onnx"))
    quant_pre_process(path.with_suffix(".raw.onnx"), path)  # what ONNX Runtime asks for: shapes, folded norms


def theirs(method: str, float_file: Path, crops: torch.Tensor, folder: Path) -> Path:
    path = folder / f"ort-{method}.onnx"
    quantize_static(
        float_file,
        path,
        Crops(session(float_file).get_inputs()[0].name, crops),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, THEIRS[method]),
    )
    return path


def ours(calibrator: str, model: torch.nn.Module, photos: Photos, samples: int, folder: Path) -> Path:
    out = folder / f"qpipe-{calibrator}"
    qpipe.quantize(
        model,
        photos,
        task=qpipe.Task(),
        out=out,
        num_samples=samples,
        calibrator=calibrator,
        granularity="channel",
        evaluator=[],
        exporter=[{"name": "onnx", "samples": 32, "compare_fp32": False}],
    )
    return out / "onnx" / "model.onnx"


def judge(path: Path, crops: torch.Tensor, reference: np.ndarray[Any, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        logits = run(session(path, optimized), crops)
        nodes = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    noise = np.square(logits - reference).sum()
    return {
        "sqnr_db": 10 * np.log10(np.square(reference).sum() / noise).item(),
        "agreement": (logits.argmax(1) == reference.argmax(1)).mean().item(),
        "float_convolutions": nodes["Conv"] + nodes["FusedConv"],
        "nodes": dict(nodes),
        "megabytes": path.stat().st_size / 1e6,
    }


def cpu_ms(files: dict[str, Path], crops: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds an image for each file and batch size: the median of rounds taken in turns."""
    sessions = {name: session(path) for name, path in files.items()}
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in files}
    for runtime in sessions.values():
        run(runtime, crops[:1])
    for _ in range(rounds):
        for size, calls in SIZES.items():
            for name, runtime in sessions.items():
                feed = {runtime.get_inputs()[0].name: crops[:size].numpy()}
                start = time.process_time()
                for _ in range(calls):
                    runtime.run(None, feed)
                times[name][size].append(1e3 * (time.process_time() - start) / calls / size)
    return {
        name: {f"cpu_ms_b{size}": statistics.median(values) for size, values in sizes.items()}
        for name, sizes in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=32, help="crops to calibrate on")
    parser.add_argument("--evaluation", type=int, default=256, help="crops to judge on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibrators", nargs="*", default=CALIBRATORS)
    parser.add_argument("--methods", nargs="*", default=[*THEIRS], help="of quantize_static")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model = efficientnet_lite0().eval()
    photos = Photos(num_calibration=chosen.calibration, num_evaluation=chosen.evaluation)
    photos.setup()
    calibration, evaluation = (
        torch.stack([*photos.datasets[part]]) for part in ("calibration", "evaluation")
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"fp32": folder / "fp32.onnx"}
        export_float(model, evaluation, files["fp32"])
        for method in chosen.methods:
            files[f"ort {method}"] = theirs(method, files["fp32"], calibration, folder)
        for calibrator in chosen.calibrators:
            files[f"qpipe {calibrator}"] = ours(calibrator, model, photos, chosen.calibration, folder)
        reference = run(session(files["fp32"]), evaluation)
        rows = {name: judge(path, evaluation, reference) for name, path in files.items() if name != "fp32"}
        speeds = cpu_ms(files, evaluation, chosen.rounds)
    for name, speed in speeds.items():
        print(json.dumps({"file": name, **rows.get(name, {}), **speed}))
    best = {
        tool: max(r["sqnr_db"] for n, r in rows.items() if n.startswith(tool)) for tool in ("ort", "qpipe")
    }
    print(f"best sqnr_db: ort {best['ort']:.2f}, qpipe {best['qpipe']:.2f} (bar: ort - 0.1)")
    for size in SIZES:
        key = f"cpu_ms_b{size}"
        fastest = {t: min(s[key] for n, s in speeds.items() if n.startswith(t)) for t in ("ort", "qpipe")}
        ratio = fastest["qpipe"] / fastest["ort"]
        print(f"batch {size}: qpipe / ort CPU time {ratio:.3f} (bar: at most {1 / 0.97:.3f})")


if __name__ == "__main__":
    main()

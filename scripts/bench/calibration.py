"""What calibration costs over the plain forward pass of EfficientNet-Lite0, and how much memory.

    python scripts/bench/calibration.py

CPU time of this process on one thread, medians of interleaved rounds. Peak memory in a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from qpipe_zoo.data.photos import Photos
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from torch import nn

from qpipe.choices import build_recipe, library_config
from qpipe.nn import edge_quantizers
from qpipe.pipeline import _quiet_trainer
from qpipe.registry import PluginRegistry
from qpipe.stages.calibrate import calibrate_activations, calibrate_weights, fit_together, observe
from qpipe.stages.data import calibration_batches
from qpipe.stages.forward import forward_pass
from qpipe.stages.prepare import prepare
from qpipe.task import Batches, Task

CALIBRATORS = ("minmax", "percentile", "kl", "mse")  # extremes, then three that read histograms


def prepared(calibrator: str, batches: Batches) -> nn.Module:
    recipe = build_recipe(
        library_config({"calibrator": calibrator}, exporting=False), PluginRegistry.load_installed()
    )
    model = efficientnet_lite0()
    for transform in recipe.transforms:
        transform.apply(model, batches, Task(), recipe)
    prepare(model, batches, Task(), recipe)
    calibrate_weights(model)
    return model


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def costs(rounds: int, num_samples: int) -> None:
    """Print the CPU time of both statistics over that of the plain pass, and of the searches that follow."""
    batches = list(calibration_batches(Photos(), num_samples))
    trainer, plain = _quiet_trainer(), efficientnet_lite0()
    models = {name: prepared(name, batches) for name in CALIBRATORS}
    times: dict[str, list[float]] = {"plain": [], "extremes": [], "histograms": []}
    for _ in range(rounds):
        times["plain"].append(cpu_seconds(partial(forward_pass, plain, batches, Task(), trainer, "plain")))
        for what, name in (("extremes", "minmax"), ("histograms", "kl")):
            edges = edge_quantizers(models[name])
            times[what].append(cpu_seconds(partial(observe, models[name], edges, batches, Task(), trainer)))
    base = statistics.median(times["plain"])
    print(f"plain forward of {num_samples} images: {base:.2f} s CPU, one thread")
    for what in ("extremes", "histograms"):
        print(f"{what}: {statistics.median(times[what]) / base:.2f} x the plain forward")
    for name, model in models.items():
        edges = edge_quantizers(model)
        seen = observe(model, edges, batches, Task(), trainer)
        search = cpu_seconds(partial(fit_together, edges[0].slot, edges, [seen[edge] for edge in edges]))
        print(f"{name}: search over {len(edges)} edges {search:.2f} s CPU")


def peak_mib(num_batches: int, calibrator: str) -> float:
    """Return the peak memory of this process after calibrating on num_batches of 4 images."""
    batches = calibration_batches(Photos(batch_size=4), 4 * num_batches)
    model = prepared(calibrator, batches)
    calibrate_activations(model, batches, Task(), _quiet_trainer())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--peak", type=int, help="only print the peak memory after so many batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak_mib(arguments.peak, "kl")))
        return
    costs(arguments.rounds, arguments.num_samples)
    for count in (4, 32):
        command = [sys.executable, __file__, "--peak", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory, kl, {count:2} batches of 4: {float(done.stdout.splitlines()[-1]):.0f} MiB")


if __name__ == "__main__":
    main()

"""Time the KL search against a plain loop and ONNX Runtime's.

CPU seconds, one thread. The plain loop is the definition, one clip at a time; ONNX Runtime's
get_entropy_threshold searches its own two-sided histogram of as many bins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from qpipe_methods.calibrator.kl import divergence

NUM_LEVELS, NUM_TENSORS = 128, 100


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def sample_values() -> np.ndarray:
    """Tensors from light to heavy tails: |N(0, 1)|^(0.7 ... 2.5), signed."""
    x = np.random.default_rng(0).standard_normal((NUM_TENSORS, 50_000))
    powers = np.linspace(0.7, 2.5, NUM_TENSORS)[:, None]
    return np.sign(x) * np.abs(x) ** powers


def plain_divergence(counts: np.ndarray, clip: int) -> float:
    """KL(P || Q) of one clip, as METHODS.md defines it."""
    p, tail = counts[:clip].copy(), counts[clip:].sum()
    q = np.zeros(clip)
    edges = np.arange(NUM_LEVELS + 1) * clip // NUM_LEVELS
    for low, high in pairwise(edges):
        occupied = p[low:high] > 0
        q[low:high][occupied] = p[low:high].sum() / max(occupied.sum(), 1)
    if p[-1] == 0 and tail > 0:
        q[-1] = 1
    p[-1] += tail
    used = p > 0
    p, q = p[used] / p.sum(), q[used] / q.sum()
    return float((p * np.log(p / q)).sum())


def plain_argmin(counts: np.ndarray) -> int:
    return int(np.argmin([plain_divergence(counts, clip) for clip in range(NUM_LEVELS, len(counts) + 1)]))


def main() -> None:
    torch.set_num_threads(1)
    x = sample_values()
    for num_bins in (2048, 4096):
        counts = np.stack([np.histogram(np.abs(row), num_bins)[0] for row in x]).astype(float)
        ours = cpu_seconds(lambda c=counts: divergence(torch.from_numpy(c), NUM_LEVELS), 3)
        found = divergence(torch.from_numpy(counts), NUM_LEVELS).argmin(1)
        checked = range(0, NUM_TENSORS, 10 if num_bins == 2048 else 33)
        start = time.process_time()
        same = sum(plain_argmin(counts[i]) == int(found[i]) for i in checked)
        plain = (time.process_time() - start) / len(checked)
        hist, edges = np.histogram(x[50], num_bins, range=(-np.abs(x[50]).max(), np.abs(x[50]).max()))
        collector = HistogramCollector("entropy", True, num_bins, NUM_LEVELS, None, "same")
        theirs = cpu_seconds(
            lambda h=hist, e=edges, c=collector: c.get_entropy_threshold((h, e, e[0], e[-1]), NUM_LEVELS), 1
        )
        each = ours / NUM_TENSORS
        print(f"{num_bins} bins: {NUM_TENSORS} tensors x {num_bins - NUM_LEVELS + 1} clips in {ours:.2f} s")
        print(
            f"  same argmin as the plain loop: {same} of {len(checked)}; {plain / each:.0f} x faster than it"
        )
        print(f"  ONNX Runtime: {theirs:.2f} s a tensor; {theirs / each:.0f} x faster than it")


if __name__ == "__main__":
    main()

"""How long one sample takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe import Evaluator, Subject, hookimpl


class LatencyEvaluator(Evaluator):
    """Time one sample in the float model and in executed files; a simulation's time would mean nothing.

    Args:
        seconds: spent on each variant, warm-up included.
        max_calls: timed at most.
        threads: of torch while it is timed; files run in one, so one compares like with like.
    """

    name = "latency"
    measured = ("latency_ms", "latency_p95_ms")
    repeatable = False

    def __init__(self, seconds: float = 0.5, max_calls: int = 200, threads: int = 1) -> None:
        self.seconds = seconds
        self.max_calls = max_calls
        self.threads = threads

    def measure(self, subject: Subject) -> Mapping[str, float]:
        """Return the median and the 95th percentile, latency_ms and latency_p95_ms, at batch 1."""
        if subject.variant == "simulated":
            return {}
        args, kwargs = subject.task.inputs(_one_sample(next(iter(subject.batches))))
        with _threads(self.threads):
            times = self._times_ms(subject.model, args, kwargs)
        median, p95 = torch.quantile(times, torch.tensor([0.5, 0.95], dtype=times.dtype)).tolist()
        return {"latency_ms": median, "latency_p95_ms": p95}

    @torch.inference_mode()
    def _times_ms(self, model: nn.Module, args: Any, kwargs: Any) -> Tensor:  # noqa: ANN401
        wait = torch.cuda.synchronize if _on_cuda((args, kwargs)) else _nothing
        begin = time.perf_counter()
        times: list[float] = []
        while len(times) < 3 or (len(times) < self.max_calls and time.perf_counter() < begin + self.seconds):
            wait()
            start = time.perf_counter()
            model(*args, **kwargs)
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        warm = times[min(5, len(times) // 3) :]
        return torch.tensor(warm, dtype=torch.float64)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_sample(batch: Any) -> Any:  # noqa: ANN401
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    size = tensors[0].shape[0] if tensors else 1

    def first(leaf: Any) -> Any:  # noqa: ANN401
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else leaf

    return pytree.tree_map(first, batch)


def _on_cuda(values: Any) -> bool:  # noqa: ANN401
    return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(values))


def _nothing() -> None:
    """Wait for nothing: the CPU is done when it returns."""


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the latency."""
    return [LatencyEvaluator]

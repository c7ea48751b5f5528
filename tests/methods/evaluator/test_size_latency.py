from __future__ import annotations

import time

import pytest
import torch
from qpipe_methods.evaluator.latency import LatencyEvaluator
from qpipe_methods.evaluator.size import SizeEvaluator
from torch import Tensor, nn

import qpipe
from qpipe import Recipe, Reference, Subject, Target, Task


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        time.sleep(0.004)
        return x


def subject(model: nn.Module, variant: str = "fp32") -> Subject:
    batches = [torch.zeros(4, 2)]
    return Subject(variant, model, Reference(model), batches, Task(), Recipe(None, None, Target("any", ())))


def test_latency_is_that_of_one_sample() -> None:
    evaluator = LatencyEvaluator(seconds=0.15)
    got = evaluator.measure(subject(Slow()))
    assert 4 <= got["latency_ms"] <= got["latency_p95_ms"]
    assert got["latency_ms"] < 40
    assert evaluator.measure(subject(Slow(), "simulated")) == {}


def test_size_of_a_float_model_is_its_tensors() -> None:
    assert SizeEvaluator().measure(subject(nn.Linear(10, 4))) == {"size_bytes": 4 * 44}


@pytest.mark.parametrize("num_bits", [8, 4, 3])
def test_size_counts_packed_codes(num_bits: int) -> None:
    _, report = qpipe.quantize(
        nn.Linear(10, 4),
        torch.randn(32, 10),
        weight={"num_bits": num_bits},
        activation=None,
        evaluator=["size"],
    )
    codes = (40 * num_bits + 7) // 8
    assert report.metrics["simulated"]["size_bytes"] == codes + 4 * 4 + 4 * 4  # codes, biases, scales


def test_latency_uses_one_thread_and_gives_the_others_back() -> None:
    seen: set[int] = set()

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        LatencyEvaluator(max_calls=3).measure(subject(Watch()))
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

from __future__ import annotations

import pytest
import torch
from qpipe_methods.evaluator.sqnr import SQNREvaluator

from qpipe import Task


def measure(task: Task, *pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    metrics = SQNREvaluator().metrics(task, "simulated")
    for output, reference in pairs:
        for metric in metrics.values():
            metric.update(output, reference, None)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_figures_of_a_case_worked_by_hand() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    output = torch.tensor([[3.0, 3.0], [1.0, 0.0]])
    got = measure(Task(), (output[:1], reference[:1]), (output[1:], reference[1:]))  # energies: 26 and 3
    assert got["sqnr_db"] == pytest.approx(9.3785, abs=1e-3)  # 10 log10(26 / 3)
    assert got["agreement_percent"] == 0  # 3 = 3 takes the first
    assert got["mean_cosine"] == pytest.approx((21 / (5 * 18**0.5) + 0) / 2)


def test_an_exact_copy_is_infinitely_good() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    got = measure(Task(), (x, x))
    assert got["sqnr_db"] == float("inf")
    assert got["agreement_percent"] == 100


def test_agreement_needs_classes_and_the_float_model_is_not_compared_with_itself() -> None:
    assert "agreement_percent" not in SQNREvaluator().metrics(Task(class_dim=None), "simulated")
    assert SQNREvaluator().metrics(Task(), "fp32") == {}

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


def rows_of(**choices: Any) -> tuple[qpipe.Report, dict[str, Any]]:  # noqa: ANN401
    torch.manual_seed(0)
    model, data = Net(), torch.randn(256, 16)
    _, report = qpipe.quantize(
        model, data, evaluator=["sqnr", {"name": "roles", "num_batches": 99}], **choices
    )
    return report, {row["quantized"]: row for row in report.tables["simulated.roles"]["roles"]}


def test_each_role_alone_is_a_run_without_the_other() -> None:
    bits = {"weight": {"num_bits": 4}, "activation": {"num_bits": 6}}
    report, rows = rows_of(**bits)
    assert rows["both"]["sqnr_db"] == pytest.approx(report.metrics["simulated"]["sqnr_db"], abs=1e-6)
    for case, off in (("weights only", "activation"), ("activations only", "weight")):
        alone, _ = rows_of(**{**bits, off: None})
        assert rows[case]["sqnr_db"] == pytest.approx(alone.metrics["simulated"]["sqnr_db"], abs=1e-6)
    assert report.tables["simulated.roles"]["finding"].startswith("Most of the loss comes from weights")

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


def test_uniform_data_has_the_noise_of_uniform_steps() -> None:
    torch.manual_seed(0)
    data = torch.rand(512, 8)
    _, report = qpipe.quantize(Net(), data, evaluator=[{"name": "edge_sqnr", "num_batches": 16}])
    rows = report.tables["simulated.edge_sqnr"]["edges"]
    values = [row["sqnr_db"] for row in rows]
    assert values == sorted(values)
    assert {row["edge"] for row in rows} == {edge["name"] for edge in report.edges}
    [first] = [row["sqnr_db"] for row in rows if row["edge"] == report.edges[0]["name"]]
    # E[x^2] = 1/3 over step^2 / 12, step = 1/255: 10 log10(4 * 255^2)
    assert first == pytest.approx(54.15, abs=0.15)

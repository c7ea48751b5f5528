from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpipe


class Pass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def table(data: Tensor, **choices: Any) -> dict[str, Any]:  # noqa: ANN401
    torch.manual_seed(0)
    _, report = qpipe.quantize(Pass(), [(data,)], evaluator=["histograms"], **choices)
    return dict(report.tables["simulated.histograms"])


def test_what_a_gaussian_loses_beyond_its_range_is_the_known_share() -> None:
    data = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    found = table(data, activation={"num_bits": 4, "symmetric": True, "signed": True, "calibrator": "mse"})
    [row] = [row for row in found["activations"] if row["name"] == "input"]
    step = (row["clip_high"] - row["clip_low"]) / 15
    beyond = [
        math.erfc((abs(end) + step / 2) / math.sqrt(2)) / 2 for end in (row["clip_low"], row["clip_high"])
    ]
    assert row["clipped_percent"] == pytest.approx(100 * sum(beyond), rel=0.05)
    assert row["num_levels"] == len(row["levels"]) == 16
    assert row["levels"] == pytest.approx([row["clip_low"] + i * step for i in range(16)], abs=1e-5)
    width = (row["high"] - row["low"]) / len(row["counts"])
    inside = sum(n for i, n in enumerate(row["counts"]) if abs(row["low"] + (i + 0.5) * width) < 1)
    assert inside / sum(row["counts"]) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.05)
    assert sum(row["counts"]) == data.numel()


def test_channels_with_ranges_of_their_own_share_one_unit() -> None:
    found = table(torch.randn(64, 64))
    [row] = found["weights"]
    assert (row["clip_low"], row["clip_high"]) == pytest.approx((-1, 1))
    assert row["clipped_percent"] == 0
    assert "levels" not in row


def test_levels_that_are_no_grid_are_those_that_came_out() -> None:
    found = table(torch.randn(256, 64), weight={"num_bits": 4, "quantizer": "nf4", "granularity": "layer"})
    [row] = found["weights"]
    steps = torch.tensor(row["levels"]).diff()
    assert row["num_levels"] == 16
    assert steps.max() > 1.5 * steps.min()

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpipe
from qpipe.nn import FakeQuant, disabled


class Net(nn.Module):
    """Residual, with an addition in place behind an edge."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.mid = nn.Linear(16, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc(x))
        h = torch.relu(self.mid(h) + h)
        return self.out(h)


def test_shares_are_those_of_each_tensor_quantized_alone() -> None:
    torch.manual_seed(0)
    model, data = Net().eval(), torch.randn(512, 16)
    simulation, report = qpipe.quantize(
        model,
        data,
        weight={"num_bits": 7},
        layers=[{"match": "mid", "weight": {"num_bits": 5}}],
        evaluator=[{"name": "shares", "num_samples": 512}],
    )
    rows = {row["tensor"]: row for row in report.tables["simulated.shares"]["shares"]}
    quantizers = [m for m in simulation.modules() if isinstance(m, FakeQuant)]
    assert set(rows) == {q.name for q in quantizers}
    with torch.no_grad():
        expected = model(data)
        noise = {}
        for quantizer in quantizers:
            with disabled(simulation):
                quantizer.enabled = True
                noise[quantizer.name] = (simulation(data) - expected).double().square().sum().item()
    signal = expected.double().square().sum().item()
    total = sum(noise.values())
    for name, energy in noise.items():
        assert rows[name]["share_percent"] == pytest.approx(100 * energy / total, rel=0.25)
        alone = 10 * torch.tensor(signal / energy).log10().item()
        assert rows[name]["sqnr_db"] == pytest.approx(alone, abs=1.0)
    assert next(iter(rows)) == "mid:weight" == max(noise, key=lambda name: noise[name])
    assert sum(row["share_percent"] for row in rows.values()) == pytest.approx(100)

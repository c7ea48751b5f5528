"""Every registered quantizer and strategy as typed: recorded in MLflow, stored in its bits, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from qpipe.__main__ import main
from qpipe.registry import PluginRegistry

REGISTRY = PluginRegistry.load_installed()
THINGS = """
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
            nn.Linear(8, 3),
        )


class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.arange(32) % 3), 8)

    val_dataloader = test_dataloader = train_dataloader
"""
COMMON = (
    *("model._target_=small.Net", "data._target_=small.Data", "data.calibration.num_samples=32"),
    *("evaluator=[size,accuracy]", "exporter=[safetensors]", "cache=false", "out=run"),
)
ASYMMETRIC = "weight.symmetric=false weight.signed=false weight.restricted=false"
QUANTIZERS = {  # what each needs beside its name; the others run with four bits
    "binary": "weight.num_bits=1",
    "hqq": f"weight.num_bits=3 {ASYMMETRIC}",
    "ternary": "weight.num_bits=2",
    "vector": "weight.granularity=layer weight.num_bits=4",
}
STRATEGIES = {
    "adaround": "finetune.adaround.iterations=4",
    "allocate": "finetune.allocate.budget.average_bits=4 finetune.allocate.num_samples=8",
    "autoround": "finetune.autoround.iterations=4",
    "brecq": "finetune.brecq.iterations=4",
    "learned_levels": "weight.quantizer=codebook",
    "revert": "gate.max_drop=100",
    "ttq": "weight.quantizer=ternary weight.num_bits=2",
}


def words_of(kind: str, name: str) -> list[str]:
    """Return the command line that a method is tried with."""
    if kind == "quantizer":
        return [f"weight.quantizer={name}", *QUANTIZERS.get(name, "weight.num_bits=4").split()]
    own = STRATEGIES.get(name, "").split()
    bits = [] if any("num_bits" in word for word in own) else ["weight.num_bits=3"]
    return [f"finetune=[{name}]", *bits, *own]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("quantizer", "finetune") for name in REGISTRY.names(kind)],
)
def test_a_method_runs_as_typed_is_recorded_and_stored_in_its_bits(
    kind: str, name: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.py").write_text(THINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "small", raising=False)
    assert main([*COMMON, f"tracker.uri={uri}", *words_of(kind, name)]) == 0

    report = json.loads(Path("run/report.json").read_text())
    tensors = load_file("run/safetensors/model.safetensors")
    size = report["metrics"]["simulated"]["size_bytes"]
    assert sum(tensor.nbytes for tensor in tensors.values()) == size
    (artifact,) = report["artifacts"]
    assert artifact["proof"] == {"bit_equal": True}  # what qpipe.load gives back computes the simulation
    assert artifact["engine"] == "simulated"

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qpipe")
    assert experiment is not None
    recorded = client.search_runs([experiment.experiment_id], max_results=1)[0]  # the latest
    assert recorded.info.status == "FINISHED"
    assert recorded.data.metrics["simulated.size_bytes"] == size
    chosen = yaml.safe_load(Path("run/config.yaml").read_text())
    where = "weight.quantizer.name" if kind == "quantizer" else f"finetune.{name}.name"
    assert recorded.data.params[where] == name
    assert (chosen["weight"]["quantizer"] if kind == "quantizer" else chosen["finetune"][name])[
        "name"
    ] == name

"""What one run found out serves the next, to the same bits; what it depends on tells them apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qpipe import cli
from qpipe.identity import data_digest, model_digest

REUSED = ["baseline (5)", "graph (1)", "ranges (1)", "statistics (2)"]
Run = Callable[..., int]
THINGS = """
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

passes = []


class Net(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Counted(list):
    def __init__(self, name, items):
        super().__init__(items)
        self.name = name

    def __getitem__(self, index):
        passes.append((self.name, index))
        return super().__getitem__(index)


class Data(LightningDataModule):
    def __init__(self, named: bool = True, shift: float = 0.0, shuffle: bool = False):
        super().__init__()
        self.shift = shift
        self.shuffle = shuffle
        if named:
            self.fingerprint = lambda: "always the same"

    def samples(self, name, seed):
        x = self.shift + torch.randn(48, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(Counted(name, x), 16, shuffle=self.shuffle and name == "calibration")

    def train_dataloader(self):
        return self.samples("calibration", 0)

    def test_dataloader(self):
        return self.samples("evaluation", 1)
"""
WORDS = [
    *("model._target_=counted.things.Net", "data._target_=counted.things.Data", "task._target_=qpipe.Task"),
    *("transform=[]", "exporter=[]", "evaluator=[sqnr,size,edge_sqnr]", "tracker=none"),
]


@pytest.fixture
def counted(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: ANN401
    """Return the command on data that counts how often it is read."""
    install("counted", {"things.py": THINGS})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> int:
        from qpipe.__main__ import main

        return main([*WORDS, *words])

    return run


def reads(part: str) -> int:
    """Return how often the last sample of a part was read since the last time."""
    import counted.things as things  # type: ignore[import-not-found]

    number = things.passes.count((part, 47))
    things.passes[:] = [read for read in things.passes if read[0] != part]
    return int(number)


def report(folder: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return stored


def test_a_second_run_reads_the_calibration_data_no_more(counted: Run) -> None:
    words = ("calibrator=kl", "finetune=[]", "activation.num_bits=4")
    assert counted(*words, "out=a") == 0
    assert reads("calibration") == 1
    assert reads("evaluation") == 2  # fp32 and simulated; edge_sqnr reads four of its batches besides
    assert counted(*words, "out=b") == 0
    assert reads("calibration") == 0
    assert counted(*words, "out=c", "cache=false") == 0
    assert reads("calibration") == 1
    first, second, third = (report(name) for name in "abc")
    assert first["metrics"] == second["metrics"] == third["metrics"]
    assert first["tables"] == second["tables"]
    assert first["reused"] == third["reused"] == []
    assert second["reused"] == REUSED


def test_it_says_so(counted: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert counted("out=a") == 0
    assert "reused" not in capsys.readouterr().err
    assert counted("out=b") == 0
    assert f"note: reused: {', '.join(REUSED)}; cache=false computes" in capsys.readouterr().err
    assert cli.main(["cache", "clear"]) == 0
    assert counted("out=c") == 0
    assert "note: reused" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "model.scale=2",
        "data.shift=1",
        "seed=1",
        "data.calibration.num_samples=40",
        "trainer.precision=bf16-mixed",
    ],
)
def test_what_it_depends_on_tells_it_apart(counted: Run, change: str) -> None:
    assert counted("out=a") == 0
    reads("calibration")
    assert counted("out=b", change) == 0
    assert all("statistics" not in line for line in report("b")["reused"])


def test_other_code_does_not_find_it(counted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted("out=a") == 0
    monkeypatch.setattr("qpipe.jobs.code_version", lambda: "another")
    assert counted("out=b") == 0
    assert report("b")["reused"] == []


def test_a_sweep_reads_the_calibration_data_once(counted: Run) -> None:
    words = ("calibrator=minmax,moving_average,percentile,mse", "weight.granularity=layer,channel")
    assert counted("-m", *words, "weight.num_bits=8,4", "out=sweep") == 0
    assert reads("calibration") == 1
    assert (
        counted("calibrator=mse", "weight.granularity=channel", "weight.num_bits=4", "out=a", "cache=false")
        == 0
    )
    rows = json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    assert rows[-1]["metrics"] == report("a")["metrics"]
    assert counted("calibrator=minmax", "weight.granularity=layer", "out=b", "cache=false") == 0
    assert rows[0]["metrics"] == report("b")["metrics"]


def test_a_longer_sweep_takes_the_points_of_a_shorter_one(counted: Run) -> None:
    assert counted("-m", "weight.num_bits=8,4", "out=short") == 0
    assert counted("-m", "weight.num_bits=8,4,3", "out=long") == 0
    rows = json.loads(Path("long/sweep.json").read_text())["jobs"]
    assert [row["reused"] for row in rows] == [True, True, False]
    assert report("long/0")["metrics"] == report("short/0")["metrics"]
    assert report("long/0")["reused"] == [f"the whole run, of {Path('short/0').absolute()}"]
    assert report("short/0")["reused"] == []
    shutil.rmtree("short")
    assert counted("-m", "weight.num_bits=8,4", "out=again", "cache=false") == 0
    rows = json.loads(Path("again/sweep.json").read_text())["jobs"]
    assert [row["reused"] for row in rows] == [False, False]
    shutil.rmtree("long")
    assert counted("-m", "weight.num_bits=8,4", "out=more") == 0  # what it knew of is gone
    rows = json.loads(Path("more/sweep.json").read_text())["jobs"]
    assert [row["reused"] for row in rows] == [False, False]
    assert report("more/0")["reused"] == REUSED


def test_data_without_a_name_is_trusted_within_one_sweep_only(counted: Run) -> None:
    assert counted("-m", "data.named=false", "calibrator=minmax,mse", "out=sweep") == 0
    assert reads("calibration") == 1
    assert counted("data.named=false", "calibrator=mse", "out=a") == 0
    assert reads("calibration") == 1
    assert report("a")["reused"] == []


def test_training_draws_the_same_numbers_with_and_without_the_cache(counted: Run) -> None:
    words = ("finetune=[distill]", "finetune.distill.distill.weight=1", "weight.num_bits=3")
    words = (*words, "trainer.max_epochs=1", "data.shuffle=true")
    for name, more in (("a", []), ("b", []), ("c", ["cache=false"])):
        assert counted(*words, f"out={name}", *more) == 0
    assert report("b")["reused"] != []
    assert report("a")["metrics"] == report("b")["metrics"] == report("c")["metrics"]


def test_a_model_is_named_by_every_bit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    name = model_digest(net)
    assert model_digest(net) == name
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = torch.nextafter(net[0].weight[0, 0, 0, 0], torch.tensor(9.0))
    assert model_digest(net) != name
    name = model_digest(net)
    net[0].stride = (2, 2)
    assert model_digest(net) != name


def test_data_is_named_by_its_files(tmp_path: Path) -> None:
    config = {"_target_": "my.Data", "path": str(tmp_path)}
    assert data_digest(config, object()) is None
    (tmp_path / "a.png").write_bytes(b"1")
    name = data_digest(config, object())
    assert name == data_digest(config, object())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.png").write_bytes(b"1")
    assert data_digest(config, object()) not in (name, None)

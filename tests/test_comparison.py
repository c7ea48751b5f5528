from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from qpipe_zoo.task.classification import Classification
from torch import nn

import qpipe
from qpipe.cli import main
from qpipe.comparison import compare, paired_interval
from qpipe.record import SAMPLES


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    a = torch.randn(400, generator=seeded(0))
    b = a + 0.3 + 0.2 * torch.randn(400, generator=seeded(1))  # in pairs: sd 0.2; apart it would be 1.4
    low, high = paired_interval(a, b, resamples=8000)
    mean, half = (b - a).mean().item(), 1.96 * (b - a).std().item() / 20
    assert low == pytest.approx(mean - half, abs=0.06 * half)
    assert high == pytest.approx(mean + half, abs=0.06 * half)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(300):
        a = torch.rand(100, generator=seeded(2 * trial)).round()  # right and wrong answers
        b = torch.where(torch.rand(100, generator=seeded(2 * trial + 1)) < 0.2, 1 - a, a)
        low, high = paired_interval(100 * a, 100 * b, resamples=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_decibels_are_those_of_sums() -> None:
    signal = torch.rand(2000, generator=seeded(0)) + 0.5
    noise = 0.01 * (torch.rand(2000, generator=seeded(1)) + 0.5)
    a, b = torch.stack([signal, noise], 1), torch.stack([signal, 2 * noise], 1)
    low, high = paired_interval(a, b, decibels=True)
    assert low == pytest.approx(-10 * math.log10(2), abs=1e-5)  # in every draw
    assert high == pytest.approx(low, abs=1e-5)
    c = torch.stack([signal, noise.flip(0)], 1)  # as much noise, on other samples
    low, high = paired_interval(a, c, decibels=True)
    ratio = (noise.flip(0) / noise.mean() - noise / noise.mean()).std().item() / math.sqrt(2000)
    assert low == pytest.approx(-1.96 * ratio * 10 / math.log(10), rel=0.1)
    assert high == pytest.approx(1.96 * ratio * 10 / math.log(10), rel=0.1)


def test_draws_are_the_same_each_time_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(50, generator=seeded(0)), torch.rand(50, generator=seeded(1))
    first = paired_interval(a, b, resamples=1000)
    assert paired_interval(a, b, resamples=1000) == first
    assert paired_interval(a, b, resamples=1000, seed=1) != first
    monkeypatch.setattr("qpipe.comparison._CHUNK", 50 * 7)
    assert paired_interval(a, b, resamples=1000) == pytest.approx(first, abs=1e-12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one model on 200 labelled samples, in 8 and in 3 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(200, 8)
    batches = list(zip(x.split(32), model(x).detach().argmax(1).split(32), strict=True))
    folder = tmp_path_factory.mktemp("runs")
    choices = {"exporter": [], "evaluator": ["accuracy", "sqnr", "edge_sqnr"], "task": Classification()}
    for bits in (8, 3):
        layers = [{"match": "0", "weight": None}] if bits == 3 else []
        qpipe.quantize(
            model, batches, weight={"num_bits": bits}, layers=layers, out=folder / str(bits), **choices
        )
        (folder / str(bits) / "config.yaml").write_text(f"weight: {{num_bits: {bits}}}\nout: {bits}\n")
    return folder / "8", folder / "3"


def test_single_samples_make_up_the_figures(runs: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file

    for folder in runs:
        kept, metrics = (
            load_file(folder / SAMPLES),
            json.loads((folder / "report.json").read_text())["metrics"],
        )
        for name in ("top1_percent", "mean_cosine", "agreement_percent"):
            assert len(kept[f"simulated.{name}"]) == 200
            assert kept[f"simulated.{name}"].mean() == pytest.approx(metrics["simulated"][name], rel=1e-5)
        signal, noise = kept["simulated.sqnr_db"].sum(0)
        assert 10 * math.log10(signal / noise) == pytest.approx(metrics["simulated"]["sqnr_db"], abs=1e-4)


def test_what_differs_is_said(runs: tuple[Path, Path]) -> None:
    found = compare(*runs)
    assert found["config"] == [{"key": "weight.num_bits", "a": 8, "b": 3}]
    assert found["warnings"] == ["only A quantizes 1 weight: 0:weight"]
    rows = {(row["variant"], row["metric"]): row for row in found["metrics"]}
    sqnr = rows["simulated", "sqnr_db"]
    assert sqnr["difference"] == sqnr["b"] - sqnr["a"] < -3
    assert sqnr["low"] < sqnr["difference"] < sqnr["high"] < 0
    assert sqnr["samples"] == 200
    assert rows["fp32", "top1_percent"]["difference"] == 0
    [(name, edges)] = found["tables"].items()
    assert name == "simulated.edge_sqnr.edges, sqnr_db"
    assert abs(edges[0]["difference"]) >= abs(edges[-1]["difference"])


def test_a_run_beside_itself_differs_in_nothing(runs: tuple[Path, Path]) -> None:
    found = compare(runs[0], runs[0])
    assert found["config"] == found["warnings"] == []
    for row in found["metrics"]:
        assert not row["difference"]
        assert row["low"] in (0, None)
        assert row["high"] in (0, None)


def test_the_command_says_it_three_ways(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, runs)
    assert main(["compare", a, str(runs[1] / "report.json"), "--html", str(tmp_path / "c.html")]) == 0
    text = capsys.readouterr()
    assert "weight.num_bits  8  3" in text.out
    assert "only A quantizes 1 weight" in text.err
    page = (tmp_path / "c.html").read_text()
    assert "weight.<wbr>num_<wbr>bits" in page
    assert "<script" not in page
    assert main(["compare", a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][0]["variant"] == "fp32"


def test_runs_of_other_samples_have_no_interval(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for file in ("report.json", "config.yaml"):
        (tmp_path / file).write_text((runs[1] / file).read_text())
    rows = compare(runs[0], tmp_path)["metrics"]
    assert all(row["low"] is None for row in rows)
    (tmp_path / SAMPLES).write_bytes(b"no")
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2


@pytest.mark.parametrize("run", ["nowhere/at/all", ""])
def test_what_is_no_run_is_one_sentence(
    run: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs[0]), run or str(runs[0].parent)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_sweep_is_no_run(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2
    assert "is a sweep; give the folder of one of its jobs" in capsys.readouterr().err

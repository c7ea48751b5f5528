from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import qpipe
from qpipe.cli import main
from qpipe.errors import RecipeError
from qpipe.page import words
from qpipe.page.run import repeat, run_page, write_page

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}"
SLOT = {"num_bits": 8, "quantizer": "uniform", "calibrator": "kl", "granularity": "layer"}


class Outline(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "onerror")]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(name: str = "stem.relu", **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "metrics": {
            "fp32": {"top1_percent": 99.4, "size_bytes": 227376.0, "latency_ms": 0.36},
            "onnx": {"top1_percent": 98.9, "size_bytes": 76948.0, "latency_ms": 0.05, "sqnr_db": "inf"},
        },
        "edges": [{"name": name, "op": name, **SLOT}],
        "weights": [{"name": name, "shape": [3, 3], **SLOT, "symmetric": True}],
        "skipped": {name: name},
        "notices": [name],
        "tables": {
            f"simulated.{name}": {
                "title": name,
                "finding": name,
                name: [{"edge": name, "sqnr_db": "inf"}, {"edge": "b", "sqnr_db": 3}, {"edge": "c"}],
                "drawn": [{"name": name, "low": -1.0, "high": 2.0, "counts": [1, 0, 5], "clip_low": -0.5}],
                "rest": name,
            }
        },
        "environment": {"cpu": name, "threads": 1, "versions": {name: name}},
        "artifacts": [
            {"path": name, "engine": name, "num_bytes": 3, "proof": {name: name, "sqnr_db": "nan"}}
        ],
        **changes,
    }


def test_whatever_a_name_holds_stays_text() -> None:
    config = {"model": {"_target_": HOSTILE}, "transform": {HOSTILE: {}}, "target": {"name": HOSTILE}}
    seen = Outline(run_page(report(HOSTILE), config, Path(HOSTILE)))
    assert not {"script", "img", "iframe", "link", "object"} & set(seen.tags)
    assert seen.addresses == []
    assert seen.text.count("<script>alert('x')</script>") > 15
    assert "{{ 7*7 }}" in seen.text


def test_the_page_says_what_was_done_and_what_it_cost() -> None:
    config = {
        "model": {"_target_": "zoo.net"},
        "data": {"calibration": {"num_samples": 256}},
        "transform": {"fold_bn": {}},
    }
    text = " ".join(Outline(run_page(report(), config, Path("r"))).text.split())
    assert "net was quantized, its activation ranges taken from 256 samples." in text
    assert "1 weight got 8 bits (uniform symmetric, kl ranges, a scale for each layer)." in text
    assert "It ran fold_bn beforehand." in text
    assert "top1 98.9 % instead of 99.4 % (-0.5)" in text
    assert "size 76.9 kB instead of 227 kB (2.95x smaller)" in text
    assert "latency 0.05 ms instead of 0.36 ms (7.2x faster)" in text
    assert "Beside the float model's outputs: sqnr ∞ dB." in text


def test_a_file_is_compared_with_the_float_model_in_its_own_engine() -> None:
    """Torch is slower than an engine at both: 0.36 ms of torch say nothing about 0.05 ms of the file."""
    proof = {"latency_ms": 0.06, "fp32_latency_ms": 0.048}
    artifact = {"exporter": "onnx", "path": "m.onnx", "engine": "e", "num_bytes": 3, "proof": proof}
    text = " ".join(Outline(run_page(report(artifacts=[artifact]), {}, Path("r"))).text.split())
    assert "latency 0.05 ms (1.25x slower, beside fp32 in that engine)" in text
    assert "faster" not in text


@pytest.mark.parametrize(
    ("value", "name", "said"),
    [
        (0.0003456, "", "3.46e-04"),
        (12345.6, "", "12,346"),
        (30.643, "sqnr_db", "30.64"),
        (1_234_567.0, "size_bytes", "1.23 MB"),
        (999.0, "size_bytes", "999 B"),
        ("nan", "sqnr_db", "not a number"),
        (None, "sqnr_db", "-"),
        ("kl", "", "kl"),
        (True, "", "yes"),
        (0, "x_percent", "0"),
    ],
)
def test_figures_are_short(value: Any, name: str, said: str) -> None:  # noqa: ANN401
    assert words.figure(value, name) == said


def test_a_run_leaves_its_page_and_its_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "run"
    qpipe.quantize(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(64, 4),
        out=folder,
        exporter=["safetensors"],
        evaluator=["sqnr", "size", "roles", "shares", "edge_sqnr", "histograms"],
    )
    page = (folder / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    kept = json.loads((folder / "report.json").read_text())
    with (folder / "csv" / "simulated.shares.shares.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tensor"] for row in rows] == [
        r["tensor"] for r in kept["tables"]["simulated.shares"]["shares"]
    ]
    with (folder / "csv" / "figures.csv").open() as file:
        assert float(list(csv.DictReader(file))[1]["sqnr_db"]) == kept["metrics"]["simulated"]["sqnr_db"]
    (folder / "report.html").unlink()
    assert main(["page", str(folder)]) == 0
    assert (folder / "report.html").read_text().replace(str(tmp_path), "") == page.replace(str(tmp_path), "")


def test_the_command_repeats_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert repeat(tmp_path / "runs" / "a b") == (
        "python -m qpipe --config 'runs/a b/config.yaml' 'out=runs/a b-again'"
    )


@pytest.mark.parametrize(
    "text", [None, "{", "[1]", '{"metrics": {}}', '{"metrics": {}, "edges": [1], "weights": []}']
)
def test_what_is_no_run_is_refused_in_a_sentence(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert main(["page", str(tmp_path)]) == 2
    assert "report.json" in capsys.readouterr().err


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report()))
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"config\.yaml cannot be read"):
        write_page(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": 3, "data": None}))
    assert "A model" in write_page(tmp_path).read_text()


def test_a_spreadsheet_computes_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report("=1+1")))
    write_page(tmp_path)
    assert "'=1+1" in (tmp_path / "csv" / "edges.csv").read_text()

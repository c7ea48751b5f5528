"""A sweep is done once: its table, and what repeating the command does."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpipe.sweep import Row, over_seeds

Run = Callable[..., int]


def stored(folder: str | Path = "sweep") -> dict[str, Any]:
    sweep: dict[str, Any] = json.loads(Path(folder, "sweep.json").read_text())
    return sweep


def test_the_table_holds_every_job(toyrun: Run) -> None:
    assert toyrun("-m", "weight.num_bits=8,4", "seed=0,1", "out=sweep") == 0
    sweep = stored()
    assert sweep["format"] == "qpipe-sweep"
    assert sweep["status"] == "finished"
    assert sweep["axes"] == {"weight.num_bits": [8, 4], "seed": [0, 1]}
    assert sweep["command"].startswith("python -m qpipe -m model._target_=toyrun.things.Net ")
    assert sweep["command"].endswith(" weight.num_bits=8,4 seed=0,1 out=sweep")
    rows = sweep["jobs"]
    assert [row["overrides"] for row in rows[:2]] == [
        {"weight.num_bits": 8, "seed": 0},
        {"weight.num_bits": 8, "seed": 1},
    ]
    assert {row["status"] for row in rows} == {"finished"}
    for row in rows:
        report = json.loads(Path("sweep", row["folder"], "report.json").read_text())
        assert report["metrics"] == row["metrics"]
        assert not row["reused"]
        assert row["seconds"] > 0
    lines = [*csv.DictReader(Path("sweep/sweep.csv").read_text().splitlines())]
    assert [line["weight.num_bits"] for line in lines] == ["8", "8", "4", "4"]
    assert float(lines[2]["simulated.size_bytes"]) == rows[2]["metrics"]["simulated"]["size_bytes"]
    assert [group["jobs"] for group in sweep["aggregated"]] == [[0, 1], [2, 3]]


def test_repeating_the_command_does_what_is_missing(toyrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", "weight.num_bits=8,4,3")
    assert toyrun(*words) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("sweep-")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report.json")}
    shutil.rmtree(folder / "1")
    (folder / ".1-half").mkdir()  # what kill -9 leaves
    (folder / ".sweep.json-123").touch()
    assert toyrun(*words) == 0
    sweep = stored(folder)
    assert [row["reused"] for row in sweep["jobs"]] == [True, False, True]
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [folder / "1/report.json"]
    assert [*folder.glob(".*-*")] == []
    assert "reused: the whole run" in capsys.readouterr().err
    assert toyrun("-m", "weight.num_bits=8,4,2") == 0  # another sweep is not confused with it
    assert len([*Path("runs").iterdir()]) == 2


def test_a_resumed_sweep_goes_on_with_its_parent_and_records_what_was_lost(
    toyrun: Run, tmp_path: Path
) -> None:
    words = ("-m", "weight.num_bits=8,4", "out=sweep")
    assert toyrun(*words) == 0
    assert toyrun(*words) == 0
    told = [json.loads(line) for line in (tmp_path / "told.txt").read_text().splitlines()]
    assert told[6:] == [
        ["start_sweep", "parent"],
        ["sync", "0", "parent"],
        ["sync", "1", "parent"],
        ["finish_sweep", "parent", "finished"],
    ]


def test_a_full_disk_is_one_sentence_and_leaves_no_run_open(
    toyrun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        if "finished" in text:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qpipe.sweep.write_aside", full)
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 1
    assert "failed: No space left on device; make room" in capsys.readouterr().err
    told = [json.loads(line) for line in (tmp_path / "told.txt").read_text().splitlines()]
    assert told[-1] == ["finish_sweep", "parent", "killed"]


def test_a_folder_of_another_sweep_is_refused(toyrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 0
    assert toyrun("-m", "weight.num_bits=8,3", "out=sweep") == 2
    assert "holds a sweep of other jobs" in capsys.readouterr().err
    assert stored()["axes"] == {"weight.num_bits": [8, 4]}


def test_changed_code_is_not_confused_with_it(
    toyrun: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 0
    monkeypatch.setattr("qpipe.sweep.code_version", lambda: "another")
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 2
    assert "another version of the code" in capsys.readouterr().err


def test_failed_jobs_are_tried_again(toyrun: Run) -> None:
    words = ("-m", "granularity@weight.granularity=token,channel", "out=sweep")
    assert toyrun(*words) == 4
    first, second = stored()["jobs"]
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert first["reason"].startswith("granularity 'token' cannot serve weights")
    assert "granularity@weight.granularity=token" in first["command"]
    assert toyrun(*words) == 4
    assert [row["reused"] for row in stored()["jobs"]] == [False, True]


def test_a_missed_gate_keeps_its_figures(toyrun: Run) -> None:
    words = ("-m", "weight.num_bits=8,4", "out=sweep", "gate.metric=size_bytes", "gate.min=48")
    assert toyrun(*words) == 4
    rows = stored()["jobs"]
    assert {row["status"] for row in rows} == {"finished", "missed"}
    assert all(row["metrics"]["simulated"]["size_bytes"] > 0 for row in rows)


def test_a_job_of_other_weights_is_done_again(toyrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("-m", "weight.num_bits=8,4", "out=sweep")
    assert toyrun(*words) == 0
    monkeypatch.setattr("qpipe.jobs.model_digest", lambda model: "other weights")
    assert toyrun(*words) == 0
    assert [row["reused"] for row in stored()["jobs"]] == [False, False]


def test_a_sweep_killed_before_its_first_job_is_resumed(toyrun: Run) -> None:
    Path("sweep").mkdir()
    Path("sweep/.lock").touch()
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 0


def test_two_processes_do_not_share_a_sweep(toyrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 0
    with FileLock("sweep/.lock"):
        assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 2
    assert "another process is running the sweep" in capsys.readouterr().err


def test_seeds_are_one_row() -> None:
    figures = [{"simulated": {"top1_percent": value}} for value in (90.0, 92.0, 97.0)]
    rows = [
        Row(i, {"calibrator": "kl", "seed": i}, [], str(i), "", metrics=metrics)
        for i, metrics in enumerate(figures)
    ]
    (group,) = over_seeds(rows)
    assert group["overrides"] == {"calibrator": "kl"}
    assert group["metrics"]["simulated"]["top1_percent"] == {
        "mean": 93.0,
        "sd": pytest.approx(13**0.5),  # of a sample: ((-3)^2 + (-1)^2 + 4^2) / 2
    }


def test_a_page_that_cannot_be_made_is_a_warning(
    toyrun: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise KeyError("no such figure")

    monkeypatch.setattr("qpipe.page.run.run_page", broken)
    monkeypatch.setattr("qpipe.page.sweep.sweep_page", broken)
    assert toyrun("-m", "weight.num_bits=8,4", "out=sweep") == 0
    assert {row["status"] for row in stored()["jobs"]} == {"finished"}
    said = [record.message for record in caplog.records if "could not be written" in record.message]
    assert len(said) == 3
    assert all("KeyError: 'no such figure'" in each and "all else is there" in each for each in said)
    assert Path("sweep/0/report.json").is_file()
    assert not Path("sweep/0/report.html").exists()

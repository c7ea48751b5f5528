"""How jobs are carried out is a word of Hydra's; what is not installed or not known is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qpipe.errors import RecipeError
from qpipe.launchers import Lost, build_launcher, split

Run = Callable[..., int]


def test_words_of_the_launcher_are_taken_out() -> None:
    words = ["hydra/launcher=joblib", "calibrator=kl", "hydra.launcher.n_jobs=4", "hydra.job.name=x"]
    chosen, rest = split(words)
    assert chosen == ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    assert rest == ["calibrator=kl", "hydra.job.name=x"]


def test_by_default_jobs_run_one_after_the_other_when_asked_for() -> None:
    started: list[int] = []
    results = build_launcher([])(lambda task: started.append(task) or task, [1, 2, 3], Path())
    assert next(results) == 1
    assert started == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra/launcher=joblip"],
            r"no launcher named 'joblip'; did you mean 'joblib'\? installed: basic, joblib",
        ),
        (["hydra.launcher.n_jobs=4"], r"hydra\.launcher\.n_jobs needs hydra/launcher=joblib"),
    ],
)
def test_what_is_not_known_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build_launcher(words)


@pytest.mark.parametrize(("name", "extra"), [("joblib", "parallel"), ("submitit_slurm", "slurm")])
def test_what_is_not_installed_names_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> object:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr("qpipe.launchers.importlib.import_module", missing)
    with pytest.raises(RecipeError, match=rf"install the extra: qpipe-quant\[{extra}\]"):
        build_launcher([f"hydra/launcher={name}"])


def test_a_single_run_has_no_launcher(toyrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert toyrun("hydra/launcher=joblib") == 2
    assert "add -m" in capsys.readouterr().err


def test_a_killed_process_takes_along_no_more_than_ran_beside_it() -> None:
    pytest.importorskip("joblib", reason="the extra parallel is not installed")

    def work(task: str) -> str:
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    launch = build_launcher(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])
    results = [*launch(work, ["a", "b", "kill", "c", "d", "e"], Path())]
    lost = {result.task for result in results if isinstance(result, Lost)}
    assert "kill" in lost
    assert len(lost) <= 2
    assert {result for result in results if not isinstance(result, Lost)} == {*"abcde"} - lost


@pytest.mark.slow
def test_jobs_in_parallel_read_the_data_once_between_them(tmp_path: Path) -> None:
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "calibrator=minmax,kl", "tracker=none"]
    environment = os.environ | {"QPIPE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qpipe", "-m", *words, "exporter=[]", "evaluator=[sqnr]", "out=sweep"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished", "finished"]
    reports = [json.loads((tmp_path / "sweep" / job["folder"] / "report.json").read_text()) for job in jobs]
    assert sum("statistics (14)" in report["reused"] for report in reports) == 1

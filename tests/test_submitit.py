"""Jobs of a cluster: processes of this machine always, a SLURM where QPIPE_TEST_SLURM=1 asks for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qpipe.errors import RecipeError
from qpipe.launchers import Lost, build_launcher

pytest.importorskip("submitit", reason="the extra slurm is not installed")

LOCAL = ["hydra/launcher=submitit_local"]
on_slurm = pytest.mark.skipif(
    not os.environ.get("QPIPE_TEST_SLURM"),
    reason="QPIPE_TEST_SLURM=1 runs it on this machine's SLURM; bash scripts/slurm_single_node.sh starts one",
)
Sweep = Callable[..., "subprocess.Popen[str]"]
THINGS = '''
import os, time
from pathlib import Path
import torch


class Net(torch.nn.Linear):
    """Writes down its job; waits while a file tells it to."""

    def __init__(self):
        super().__init__(3, 4)

    def forward(self, x):
        if Path("wait").exists():
            with Path("started.txt").open("a") as file:
                file.write(os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"] + "\\n")
            while Path("wait").exists():
                time.sleep(0.05)
        return super().forward(x)


def batches():
    return [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
'''


def work(task: tuple[str, str]) -> str:
    """Do what a task says, once; the second time it is there already."""
    what, file = task
    if not Path(file).exists():
        Path(file).touch()
        if what == "stop":  # what a queue sends before it kills
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{what} at once"
    return f"{what} again"


def test_jobs_give_results_go_on_when_stopped_and_are_named_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cloudpickle

    monkeypatch.setattr("qpipe.launchers._ASK_S", 0.2)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    tasks = [(what, str(tmp_path / what)) for what in ("plain", "stop", "kill")]
    results = [*build_launcher(LOCAL)(work, tasks, tmp_path)]
    (lost,) = (result for result in results if isinstance(result, Lost))
    assert lost.task == tasks[2]
    assert "has no result: it was killed; its log: " in lost.reason
    assert {result for result in results if result is not lost} == {"plain at once", "stop again"}
    assert [*Path(tmp_path, ".submitit").glob("*_submitted.pkl")]


def test_keys_are_those_of_hydras_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["partition=main", "timeout_min=3", "mem_gb=1", "max_num_timeout=2", "setup=[echo]"]
    build_launcher([*LOCAL, *(f"hydra.launcher.{word}" for word in words)])
    with pytest.raises(RecipeError, match=r"hydra/launcher=submitit_local: Unknown argument 'partitoin'"):
        build_launcher([*LOCAL, "hydra.launcher.partitoin=main"])
    with pytest.raises(RecipeError, match='"timeout_min" expected type'):
        build_launcher([*LOCAL, "hydra.launcher.timeout_min=long"])
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    """Return a function that starts a sweep on SLURM, in an empty folder."""
    (tmp_path / "things.py").write_text(THINGS)
    environment = os.environ | {"QPIPE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    model = ["model._target_=things.Net", "data._target_=things.batches", "task._target_=qpipe.Task"]
    light = ["transform=[]", "exporter=[]", "evaluator=[size]", "out=sweep"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"]

    with ExitStack() as stack:

        def start(*words: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "qpipe", "-m", *launcher, *model, *light, *words],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.kill)
            return stack.enter_context(process)

        yield start


def rows(folder: Path) -> list[dict[str, Any]]:
    stored: list[dict[str, Any]] = json.loads((folder / "sweep/sweep.json").read_text())["jobs"]
    return stored


def started(folder: Path, count: int) -> list[str]:
    """Wait until jobs have written themselves down so many times; return their ids."""
    file = folder / "started.txt"
    for _ in range(6000):
        lines = file.read_text().split() if file.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.1)
    raise AssertionError(f"{lines} after ten minutes")


@on_slurm
@pytest.mark.slurm
@pytest.mark.timeout(1800)  # a queue has its own pace
def test_slurm_repeats_what_is_stopped_and_the_command_what_is_cancelled(
    sweep: Sweep, tmp_path: Path
) -> None:
    from mlflow import MlflowClient
    from qpipe_mlflow._store import quiet

    words = ("weight.num_bits=8,4,3",)
    (tmp_path / "wait").touch()
    running = sweep(*words)
    first, second = started(tmp_path, 2)[:2]  # as many as the machine has processors
    subprocess.run(["scancel", "--signal=TERM", first], check=True)
    subprocess.run(["scancel", second], check=True)
    assert first in started(tmp_path, 4)[2:]
    (tmp_path / "wait").unlink()
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 4, said
    assert f"job {second} has no result: it was killed" in said
    assert Counter(row["status"] for row in rows(tmp_path)) == {"finished": 2, "failed": 1}
    repeated = sweep(*words)
    said, _ = repeated.communicate(timeout=600)
    assert repeated.returncode == 0, said
    assert sorted(row["reused"] for row in rows(tmp_path)) == [False, True, True]
    with quiet():
        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("qpipe")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
    children = Counter(run.info.status for run in runs if "mlflow.parentRunId" in run.data.tags)
    assert children == {"FINISHED": 3, "KILLED": 2}

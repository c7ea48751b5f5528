"""Kill sweeps at random moments, and start jobs together on a fresh machine; then look at what is left.

    python scripts/bench/crashes.py kill --rounds 20
    python scripts/bench/crashes.py fresh --rounds 10

Processes are forked from one that has imported everything, so that moments fall into the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

SWEEP = ["-m", "calibrator=minmax,percentile", "weight.num_bits=8,4"]
JOB = ["exporter=[safetensors]", "evaluator=[sqnr]", "data.calibration.num_samples=64"]


def start(words: list[str]) -> int:
    """Fork a process that runs the command; return its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from qpipe.__main__ import main

        code = main(words)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def left() -> list[str]:
    """Return what is wrong with the working folder after its sweep was repeated."""
    from mlflow import MlflowClient

    from qpipe.cache import Store, default_folder

    wrong = []
    (folder,) = Path("runs").iterdir()
    sweep = json.loads((folder / "sweep.json").read_text())
    if sweep["status"] != "finished" or [row["status"] for row in sweep["jobs"]] != ["finished"] * 4:
        wrong.append(f"sweep {sweep['status']}: {[row['status'] for row in sweep['jobs']]}")
    if names := sorted(
        path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"
    ):
        wrong.append(f"half done: {names}")
    client = MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("qpipe")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    if running := [run.info.run_id for run in runs if run.info.status == "RUNNING"]:
        wrong.append(f"{len(running)} runs are left RUNNING")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep["parent"]]
    points = Counter(
        (run.data.params["calibrator.name"], run.data.params["weight.num_bits"])
        for run in children
        if run.info.status == "FINISHED" and "simulated.sqnr_db" in run.data.metrics
    )
    if len(points) != 4 or set(points.values()) != {1}:
        wrong.append(f"points in MLflow: {dict(points)}")
    store = Store(default_folder())
    wrong += [f"damaged: {e.kind} {e.key}" for e in store.listed() if store.get(e.kind, e.key) is None]
    return wrong


def kill(rounds: int, seed: int) -> int:
    """Kill one sweep each round, repeat the command, look; one that ended before its moment is no round."""
    moments = random.Random(seed)
    duration = min(undisturbed() for _ in range(3))
    number = bad = late = 0
    while number < rounds and late < rounds:
        with fresh_folder():
            pid = start([*SWEEP, *JOB])
            moment = moments.uniform(0, duration)
            while cpu_seconds(pid) < moment:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if died != -signal.SIGKILL:
                late += 1
                continue
            done = len([*Path("runs").glob("*/*/report.json")])
            code = os.waitstatus_to_exitcode(os.waitpid(start([*SWEEP, *JOB]), 0)[1])
            wrong = left() if code == 0 else [f"exit code {code}", Path("log.txt").read_text()[-2000:]]
            bad += bool(wrong)
            print(
                f"{number}: killed after {moment:.1f} s, {done} done; wrong: {wrong or 'nothing'}", flush=True
            )
            number += 1
    print(f"{number - bad} of {number} killed sweeps are whole; {late} more ended before their moment")
    return bad + (number < rounds)


def undisturbed() -> float:
    """Return what a whole sweep takes, in CPU time: the same on a busy machine."""
    with fresh_folder():
        _, status, used = os.wait4(start([*SWEEP, *JOB]), 0)
        code, wrong = os.waitstatus_to_exitcode(status), left()
        duration = used.ru_utime + used.ru_stime
        print(f"undisturbed: exit code {code}, {duration:.1f} s; wrong: {wrong or 'nothing'}", flush=True)
        return duration


def cpu_seconds(pid: int) -> float:
    """Return what a process has used; infinite once it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def together(rounds: int) -> int:
    """Start four jobs at once where there is neither a database nor a cache."""
    bad = 0
    for number in range(rounds):
        with fresh_folder():
            words = [
                [*JOB, f"calibrator={name}", f"out={name}"] for name in ("minmax", "percentile", "kl", "mse")
            ]
            pids = [start(each) for each in words]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            bad += any(codes)
            print(f"{number}: exit codes {codes}", flush=True)
            if any(codes):
                print(Path("log.txt").read_text()[-3000:])
    print(f"{rounds - bad} of {rounds} succeed")
    return bad


class fresh_folder:  # noqa: N801  # reads as a word
    """An empty working folder with a cache of its own."""

    def __enter__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.chdir(self.folder.name)
        os.environ["QPIPE_CACHE"] = str(Path("cache").absolute())

    def __exit__(self, *error: object) -> None:
        os.chdir("/")
        self.folder.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "fresh"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in ("mlflow.pyfunc", "torchmetrics", "sqlalchemy", "alembic", "qpipe.jobs", "qpipe.sweep"):
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    sys.exit(
        kill(arguments.rounds, arguments.seed) if arguments.what == "kill" else together(arguments.rounds)
    )

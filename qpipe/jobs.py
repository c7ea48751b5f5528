"""One job, or the jobs of a sweep: checked, tracked, run and shown."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe import console
from qpipe.choices import build_recipe
from qpipe.errors import QpipeError, RecipeError
from qpipe.gate import check_gate
from qpipe.objects import build_data, build_model, build_task, build_trainer
from qpipe.pipeline import plan, run

if TYPE_CHECKING:
    from qpipe.kinds.tracker import Tracker
    from qpipe.registry import PluginRegistry
    from qpipe.types import Report

PARENT = "QPIPE_PARENT_RUN"  # tells a job launched as its own command which sweep it belongs to
_Config = Mapping[str, Any]


def run_job(config: _Config, registry: PluginRegistry, parent: str | None = None) -> Report:
    """Do one run, bracketed by its tracker; mistakes in the configuration are found before it starts."""
    from pytorch_lightning import seed_everything

    _check_numbers(config)
    recipe = build_recipe(config, registry)
    folder = run_folder(config["out"])
    seed_everything(config["seed"], workers=True, verbose=False)
    model, data = build_model(config["model"]), build_data(config["data"])
    task = build_task(config["task"])
    num_samples = config["data"]["calibration"]["num_samples"]
    console.header(config)
    if config["plan"]:
        report = plan(model, data, task, recipe, num_samples)
        console.summary(report)
        return report
    with tracked(config, registry, parent) as record:
        trainer = build_trainer(config["trainer"], record.logger)
        own_folder = folder if console.is_rank_zero() else None
        _, report = run(model, data, task, recipe, trainer, own_folder, num_samples, dict(config))
        record.report = report
    console.summary(report, record.where)
    check_gate(report.metrics, **config["gate"])
    return report


def _check_numbers(config: _Config) -> None:
    """Refuse words where a number belongs.

    Raises:
        RecipeError: names the key.
    """
    if type(config["seed"]) is not int:
        raise RecipeError(f"seed={config['seed']} is no whole number; give one, seed=0")
    for key in ("max_drop", "min"):
        value = config["gate"][key]
        if value is not None and type(value) not in (int, float):
            raise RecipeError(
                f"gate.{key}={value} is no number; give one in the metric's unit, gate.{key}=1.0"
            )


class Record:
    """What a tracker is told when the run ends, and what it answers."""

    def __init__(self, logger: Any) -> None:  # noqa: ANN401  # a Lightning logger, or False
        self.logger = logger
        self.report: Report | None = None
        self.where: str | None = None


@contextmanager
def tracked(config: _Config, registry: PluginRegistry, parent: str | None) -> Iterator[Record]:
    """Open the run in its tracker and close it as finished, failed or killed."""
    tracker = _tracker(config, registry)
    record = Record(tracker.start(config, parent or os.environ.get(PARENT)) if tracker else False)
    status = "failed"
    try:
        yield record
        status = "finished"
    except (KeyboardInterrupt, SystemExit):  # Lightning exits when interrupted
        status = "killed"
        raise
    finally:
        if tracker:
            record.where = tracker.finish(
                record.report, record.report.folder if record.report else None, status
            )


def run_sweep(jobs: Sequence[Sequence[str]], configs: Sequence[_Config], registry: PluginRegistry) -> int:
    """Run the jobs one after the other under one parent, each in its own folder; return the exit code."""
    folder = run_folder(configs[0]["out"])
    tracker = None if configs[0]["plan"] else _tracker(configs[0], registry)
    parent = tracker.start_sweep(configs[0]) if tracker else None
    rows: list[tuple[str, Report | None]] = []
    failures: list[tuple[str, str]] = []
    status = "killed"
    try:
        for index, (words, config) in enumerate(zip(jobs, configs, strict=True)):
            varied = " ".join(word for word in words if not all(word in job for job in jobs))
            console.notice(f"job {index + 1} of {len(jobs)}: {varied}")
            words = [*(word for word in words if not word.startswith("out=")), f"out={folder / str(index)}"]
            outcome = _attempt(words, {**config, "out": str(folder / str(index))}, registry, parent)
            rows.append((varied, None if isinstance(outcome, str) else outcome))
            if isinstance(outcome, str):
                failures.append((outcome, console.command(words)))
                if config["fail_fast"]:
                    break
        status = "failed" if failures else "finished"
    finally:
        if tracker and parent:
            tracker.finish_sweep(parent, status)
        console.sweep(rows, failures)
    return 4 if failures else 0


def run_folder(out: str | None) -> Path:
    """Return the absolute folder of a run.

    Raises:
        RecipeError: it holds something already, or cannot be written.
    """
    folder = Path(out or time.strftime("runs/%Y-%m-%d_%H-%M-%S")).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a finished run" if (folder / "report.json").is_file() else "something already"
        raise RecipeError(f"out={out or folder} holds {what}; choose another folder")
    nearest = next(parent for parent in folder.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RecipeError(f"out={out or folder} cannot be made: {nearest} is not a folder one may write to")
    return folder


def _tracker(config: _Config, registry: PluginRegistry) -> Tracker | None:
    if config["tracker"] is None or not console.is_rank_zero():
        return None
    tracker: Tracker = registry.create("tracker", config["tracker"])
    return tracker


def _attempt(
    words: Sequence[str], config: _Config, registry: PluginRegistry, parent: str | None
) -> Report | str:
    """Run one job of a sweep; a failure is printed and returned as its reason, and the sweep goes on."""
    try:
        if _has_several_processes(config["trainer"]):
            return _launch(words, config, parent)
        return run_job(config, registry, parent)
    except QpipeError as error:
        console.error(error)
        return str(error)
    except Exception as error:  # a stranger's model or data may raise anything
        traceback.print_exc()
        return "".join(traceback.format_exception_only(error)).splitlines()[0]


def _has_several_processes(trainer: _Config) -> bool:
    """Whether Lightning will rerun this very command, which in a sweep would run the sweep again."""
    return any(
        str(trainer.get(key, "1")) not in ("1", "auto") for key in ("strategy", "devices", "num_nodes")
    )


def _launch(words: Sequence[str], config: _Config, parent: str | None) -> Report | str:
    """Run one job as its own command; its figures are read back from its folder."""
    environment = os.environ | ({PARENT: parent} if parent else {})
    command = [sys.executable, "-m", "qpipe", *words]
    code = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603  # this very program
    if code:
        return f"its command ended with exit code {code}"
    return _read_report(Path(config["out"]))


def _read_report(folder: Path) -> Report:
    import json

    from qpipe.types import Report

    return Report(json.loads((folder / "report.json").read_text())["metrics"], folder=folder)

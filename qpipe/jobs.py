"""One job: checked, tracked, run and shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe import console
from qpipe.cache import Entry, Shelf, Store, default_folder, default_limit, digest
from qpipe.choices import build_recipe
from qpipe.errors import QpipeError, RecipeError
from qpipe.identity import code_version, data_digest, machine, model_digest, source_digest
from qpipe.objects import build_data, build_model, build_task, build_trainer
from qpipe.pipeline import plan, run
from qpipe.randomness import random_state, set_random_state
from qpipe.record import staged, write_aside

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule
    from torch import nn

    from qpipe.kinds.tracker import Tracker
    from qpipe.registry import PluginRegistry
    from qpipe.statistics import Statistics
    from qpipe.task import Task
    from qpipe.types import Report

PLACE = ("out", "plan", "fail_fast", "tracker", "cache", "explicit")  # what a result does not depend on
_TRAINING = (  # keys of the trainer that change no forward pass
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "limit_train_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "callbacks"),
)
EARLIER = "the whole run, finished earlier"
PARENT = "QPIPE_PARENT_RUN"  # tells a job launched as its own command which sweep it belongs to
_Config = Mapping[str, Any]
_Built = tuple["nn.Module", "LightningDataModule", "Task"]


class Session:
    """What the jobs of one process share: a store, what they are built of, and what is worth collecting.

    Args:
        several: jobs are to come, so that results are worth their memory.
        also: statistics that other jobs will want, by the front of their configuration.
    """

    def __init__(
        self, several: bool = False, also: Mapping[str, Collection[type[Statistics]]] | None = None
    ) -> None:
        self.store = Store(default_folder(), default_limit(), remember=several)
        self.several = several
        self.also = also or {}
        self._built: tuple[str, _Built, Any] | None = None

    def build(self, config: _Config) -> _Built:
        """Build what a run works on; the seed decides what is random of it."""
        from pytorch_lightning import seed_everything

        key = front(config) if config.get("cache", True) else ""
        seed_everything(config["seed"], workers=True, verbose=False)
        if self._built and self._built[0] == key:
            set_random_state(self._built[2])  # as it is after building
            return self._built[1]
        self._built = None  # before the next one is built: two may not fit
        built = build_model(config["model"]), build_data(config["data"]), build_task(config["task"])
        if self.several and key:
            self._built = (key, built, random_state())
        return built

    def shelf(self, config: _Config, data: LightningDataModule, task: Task) -> Shelf:
        """Return the shelf of a job: it depends on code, data, machine and how a model is run."""
        if not config.get("cache", True) or has_several_processes(config["trainer"]):
            return Shelf()
        known = data_digest(config["data"], data)
        trainer = {key: value for key, value in config["trainer"].items() if key not in _TRAINING}
        parts = (known or config["data"], config["seed"], config["task"], source_digest(task), trainer)
        return Shelf(self.store, parts=(code_version(), machine(), *parts), lasting=known is not None)


def front(config: _Config) -> str:
    """Name the part of a configuration that comes before ranges are chosen."""
    return digest({key: config[key] for key in ("model", "data", "task", "seed", "transform")})


def run_job(
    config: _Config,
    registry: PluginRegistry,
    parent: str | None = None,
    resume: bool = False,
    session: Session | None = None,
) -> Report:
    """Do one run, bracketed by its tracker; mistakes in the configuration are found before it starts.

    Args:
        resume: where the folder holds this very run already, finished, return its report; where it holds
            one of other weights or data, replace it; where another folder holds it, copy that.
    """
    _check_plain(config)
    session = session or Session()
    recipe = build_recipe(config, registry)
    if resume and not config["plan"] and (earlier := earlier_run(config, registry, session, parent)):
        recipe.gate.check(earlier.metrics)
        return earlier
    folder = run_folder(config["out"])
    model, data, task = session.build(config)
    num_samples = config["data"]["calibration"]["num_samples"]
    if config["plan"]:
        console.header(config)
        report = plan(model, data, task, recipe, num_samples)
        console.summary(report)
        return report
    name = run_identity(config, model, data, task)
    recipe = replace(recipe, shelf=session.shelf(config, data, task))
    runs = recipe.shelf.of("runs")
    if resume and (copied := _copied(runs, name, folder)):
        _sync(config, registry, folder, parent)
        recipe.gate.check(copied.metrics)
        return copied
    if not session.several:
        console.header(config)
    also = session.also.get(front(config), ())
    with tracked(config, registry, parent) as record:
        trainer = build_trainer(config["trainer"], record.logger)
        own_folder = folder if console.is_rank_zero() else None
        _, report = run(model, data, task, recipe, trainer, own_folder, num_samples, dict(config), name, also)
        record.report = report
    runs.put(name, Entry(data=str(folder)))
    console.summary(report, None if session.several else record.where, brief=session.several)
    recipe.gate.check(report.metrics)
    return report


def run_identity(config: _Config, model: nn.Module, data: object, task: object) -> str:
    """Name everything a run depends on: what was chosen, the code, the weights, the data."""
    chosen = {key: value for key, value in config.items() if key not in PLACE}
    parts = (chosen, code_version(), model_digest(model), data_digest(config["data"], data))
    return digest(*parts, source_digest(task))


def earlier_run(
    config: _Config, registry: PluginRegistry, session: Session, parent: str | None
) -> Report | None:
    """Return the finished run in config's folder if it is this very one; clear the folder of another."""
    folder = Path(config["out"])
    if not (folder / "report.json").is_file():
        return None
    name = run_identity(config, *session.build(config))
    if _identity(folder) == name:
        console.notice(f"reused: {EARLIER}, in {folder}")
        _sync(config, registry, folder, parent)
        return replace(read_report(folder), reused=(EARLIER,))
    console.notice(f"{folder} holds a run of other weights or data; it is done again")
    shutil.rmtree(folder)
    return None


def _copied(runs: Shelf, name: str, folder: Path) -> Report | None:
    """Copy a finished run that another sweep or command left, if it is still there; the copy says so."""
    entry = runs.get(name)
    if entry is None:
        return None
    source = Path(entry.data)
    if _identity(source) != name:
        runs.drop(name)
        return None
    reused = [f"the whole run, of {source}"]
    console.notice(f"reused: {reused[0]}; cache=false computes everything")
    with staged(folder) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        report = json.loads((source / "report.json").read_text())
        write_aside(staging / "report.json", json.dumps({**report, "reused": reused}, indent=1) + "\n")
    return replace(read_report(folder), reused=(EARLIER,))


def _identity(folder: Path) -> str | None:
    """Return the identity of the run in a folder, None if none is there, or a damaged one."""
    try:
        identity: str | None = json.loads((folder / "report.json").read_text()).get("identity")
    except (OSError, ValueError):
        return None
    return identity


def _sync(config: _Config, registry: PluginRegistry, folder: Path, parent: str | None) -> None:
    """Record a run whose process may have been killed before its tracker had it."""
    tracker = make_tracker(config, registry)
    if tracker and parent:
        try:
            tracker.sync(folder, parent)
        except QpipeError as error:  # the store does not answer, or this tracker cannot
            console.notice(error)


def _check_plain(config: _Config) -> None:
    """Refuse words where a number belongs.

    Raises:
        RecipeError: names the key.
    """
    if type(config["seed"]) is not int:
        raise RecipeError(f"seed={config['seed']} is no whole number; give one, seed=0")
    if type(config.get("cache", True)) is not bool:  # a config.yaml from before it lacks the key
        raise RecipeError(f"cache={config['cache']} has no meaning; give true or false")


class Record:
    """What a tracker is told when the run ends, and what it answers."""

    def __init__(self, logger: Any) -> None:  # noqa: ANN401  # a Lightning logger, or False
        self.logger = logger
        self.report: Report | None = None
        self.where: str | None = None


@contextmanager
def tracked(config: _Config, registry: PluginRegistry, parent: str | None) -> Iterator[Record]:
    """Open the run in its tracker and close it as finished, failed or killed."""
    tracker = make_tracker(config, registry)
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


def make_tracker(config: _Config, registry: PluginRegistry) -> Tracker | None:
    """Build the tracker that was chosen; only one process has it."""
    if config["tracker"] is None or not console.is_rank_zero():
        return None
    tracker: Tracker = registry.create("tracker", config["tracker"])
    return tracker


def has_several_processes(trainer: _Config) -> bool:
    """Whether Lightning will rerun this very command, which in a sweep would run the sweep again."""
    return any(
        str(trainer.get(key, "1")) not in ("1", "auto") for key in ("strategy", "devices", "num_nodes")
    )


def launch(words: Sequence[str], config: _Config, parent: str | None) -> Report:
    """Run one job as its own command; its figures are read back from its folder.

    Raises:
        QpipeError: the command failed.
    """
    environment = os.environ | ({PARENT: parent} if parent else {})
    command = [sys.executable, "-m", "qpipe", *words, f"out={config['out']}"]
    code = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603  # this very program
    if code:
        raise QpipeError(f"its command ended with exit code {code}")
    return read_report(Path(config["out"]))


def read_report(folder: Path) -> Report:
    """Return the figures of a finished run's folder."""
    from qpipe.types import Report

    stored = json.loads((folder / "report.json").read_text())["metrics"]
    metrics = {v: {name: float(x) for name, x in figures.items()} for v, figures in stored.items()}
    return Report(metrics, folder=folder)

"""The jobs of a sweep: each done once, listed in sweep.json and sweep.csv, resumed by the same command."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import statistics
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe import console
from qpipe.cache import digest
from qpipe.choices import build_recipe
from qpipe.errors import GateError, QpipeError, RecipeError
from qpipe.identity import code_version
from qpipe.jobs import (
    EARLIER,
    PLACE,
    Session,
    earlier_run,
    front,
    has_several_processes,
    launch,
    make_tracker,
    read_report,
    run_folder,
    run_job,
)
from qpipe.launchers import Launch, Lost, build_launcher
from qpipe.page.render import only_a_page
from qpipe.page.sweep import write_sweep_page
from qpipe.record import strict, write_aside
from qpipe.stages.calibrate import needed
from qpipe.types import Role

if TYPE_CHECKING:
    from qpipe.registry import PluginRegistry
    from qpipe.statistics import Statistics

FILE, TABLE, LOCK = "sweep.json", "sweep.csv", ".lock"
_Config = Mapping[str, Any]
_Metrics = Mapping[str, Mapping[str, float]]


@dataclass
class Row:
    """One job of a sweep, as sweep.json has it.

    Args:
        overrides: what it was given of each word that varies.
        words: of its own command, out= left out.
        status: 'pending', 'finished', 'missed' (a gate; the run is kept) or 'failed'.
        seconds: from its start to its end, when it was done.
        reused: whether it was finished before this command.
        folder: of the run, relative to the sweep's.
        reason: why it failed.
        command: repeats it alone, into its place in the sweep.
    """

    index: int
    overrides: Mapping[str, Any]
    words: Sequence[str]
    folder: str
    command: str
    status: str = "pending"
    seconds: float = 0.0
    reused: bool = False
    metrics: _Metrics = field(default_factory=dict)
    reason: str = ""

    @property
    def varied(self) -> str:
        """Return the words that tell it from the other jobs."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclass
class Sweep:
    """A sweep and its folder; sweep.json and sweep.csv are rewritten after every job.

    Args:
        id: of what its jobs are and of the code that runs them.
        parent: the tracker's name for it.
        judged: the figures a sweeper looked at, as 'variant.metric'.
        findings: what it found, a sentence each.
        earlier: jobs as an earlier command left them in sweep.json, by folder.
    """

    folder: Path
    id: str
    command: str
    axes: Mapping[str, Sequence[Any]]
    rows: list[Row]
    status: str = "running"
    parent: str | None = None
    judged: Sequence[str] = ()
    findings: Sequence[str] = ()
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def place(self, row: Row) -> None:
        """Give a job its place in the sweep's folder, and the time it took in an earlier command."""
        row.command = console.command([*row.words, f"out={self.folder / row.folder}"])
        row.seconds = self.earlier.get(row.folder, {}).get("seconds", 0.0)

    def write(self) -> None:
        """Write both files, each at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / FILE, json.dumps(strict(self.as_dict()), indent=1, allow_nan=False) + "\n")
        write_aside(self.folder / TABLE, self.as_csv())

    def as_dict(self) -> dict[str, Any]:
        """Return what sweep.json holds."""
        head = {"format": "qpipe-sweep", "version": 1}
        keys = ("id", "command", "status", "parent", "axes", "judged", "findings")
        own = {key: getattr(self, key) for key in keys}
        jobs = [{**vars(row), "words": list(row.words)} for row in self.rows]
        return {**head, **own, "jobs": jobs, "aggregated": list(over_seeds(self.rows))}

    def as_csv(self) -> str:
        """Return one line a job: index, what varies, status, seconds, reused, folder, variant.metric."""
        columns = dict.fromkeys(f"{v}.{m}" for row in self.rows for v in row.metrics for m in row.metrics[v])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", *self.axes, "status", "seconds", "reused", "folder", *columns])
        for row in self.rows:
            figures = {f"{v}.{m}": x for v, metrics in row.metrics.items() for m, x in metrics.items()}
            about = [row.status, f"{row.seconds:.3f}", str(row.reused).lower(), row.folder]
            varied = [row.overrides[axis] for axis in self.axes]
            writer.writerow([row.index, *varied, *about, *(figures.get(name, "") for name in columns)])
        return text.getvalue()


def over_seeds(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield mean and standard deviation of rows that differ in their seed alone; without seeds, nothing."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "seed" in row.overrides and row.metrics:
            groups.setdefault(digest(_without_seed(row)), []).append(row)
    for group in groups.values():
        figures = {
            variant: {name: _spread([row.metrics[variant][name] for row in group]) for name in metrics}
            for variant, metrics in group[0].metrics.items()
            if all(row.metrics.get(variant, {}).keys() == metrics.keys() for row in group)
        }
        jobs = [row.index for row in group]
        yield {"overrides": _without_seed(group[0]), "jobs": jobs, "metrics": figures}


def run_sweep(
    jobs: Sequence[Sequence[str]],
    configs: Sequence[_Config],
    registry: PluginRegistry,
    typed: Sequence[str] = (),
    flags: Sequence[str] = (),
    launcher: Sequence[str] = (),
) -> int:
    """Run the jobs under one parent, each in its own folder; return the exit code.

    A sweep is known by its jobs and the code: the same command again finds its folder and does what is
    missing. By default the folder's name holds that identity; a folder named by out= is asked for it.

    Args:
        jobs: the words of each job.
        typed: the words they were made of.
        flags: what each job's command begins with, --config and its file.
        launcher: words that say how the jobs are carried out.

    Raises:
        RecipeError: the folder holds something else, or another process runs this sweep.
    """
    rows = _rows(jobs, flags)
    if configs[0]["plan"]:
        return plan_jobs(rows, configs, registry)
    launch_all = build_launcher(launcher)
    command = console.command(["-m", *flags, *launcher, *typed])
    sweep = open_sweep(rows, [chosen(config) for config in configs], configs[0]["out"], command)
    batch = list(zip(rows, configs, strict=True))
    with only_one(sweep):
        return run_jobs(sweep, [batch], registry, launch_all, wanted(configs, registry), len(rows))


def run_jobs(
    sweep: Sweep,
    batches: Iterable[Sequence[tuple[Row, _Config]]],
    registry: PluginRegistry,
    launch_all: Launch[Work, Row],
    also: Mapping[str, Collection[type[Statistics]]],
    count: int,
) -> int:
    """Carry out batches of jobs, rows of the sweep, one batch after the other; return the exit code.

    Args:
        also: statistics that later jobs will want.
        count: of all jobs.
    """
    pairs = iter(batches)
    first = next(pairs)
    config = first[0][1]
    sweep.write()
    tracker = make_tracker(config, registry)
    sweep.parent = tracker.start_sweep(config, sweep.parent) if tracker else None
    bad: list[Row] = []
    _of_this_process.cache_clear()

    try:
        sweep.write()
        rows = _carried_out(sweep, itertools.chain([first], pairs), launch_all, also, count)
        for done, row in enumerate(rows, 1):
            if row is not sweep.rows[row.index]:  # of another process, which prints elsewhere
                console.notice(f"{done} of {count} done: {row.varied} {row.status}")
            sweep.rows[row.index] = row
            sweep.write()
            if row.status in ("failed", "missed") and config["fail_fast"]:
                break
        bad = [row for row in sweep.rows if row.status in ("failed", "missed")]
        sweep.status = "failed" if bad else "finished"
    finally:
        _of_this_process.cache_clear()  # models and results of a sweep that is over
        sweep.status = "killed" if sweep.status == "running" else sweep.status
        try:
            sweep.write()
        finally:  # a full disk leaves no run open
            with only_a_page(sweep.folder):
                write_sweep_page(sweep.folder)
            where = None
            if tracker and sweep.parent:
                where = tracker.finish_sweep(sweep.parent, sweep.status, sweep.folder)
            console.sweep(sweep.rows, sweep.folder, where, sweep.findings)
    return 4 if bad else 0


def _carried_out(
    sweep: Sweep,
    batches: Iterable[Sequence[tuple[Row, _Config]]],
    launch_all: Launch[Work, Row],
    also: Mapping[str, Collection[type[Statistics]]],
    count: int,
) -> Iterator[Row]:
    for batch in batches:
        work = [
            Work(row, {**config, "out": str(sweep.folder / row.folder)}, sweep.parent, also, count)
            for row, config in batch
        ]
        for row in launch_all(carry_out, work, sweep.folder):
            yield _failed(row) if isinstance(row, Lost) else row


def wanted(configs: Sequence[_Config], registry: PluginRegistry) -> dict[str, set[type[Statistics]]]:
    """Return the statistics that jobs with the same front want, so that the first collects them all."""
    found: dict[str, set[type[Statistics]]] = {}
    for config in configs:
        with suppress(QpipeError):  # said when its turn comes
            recipe = build_recipe(config, registry)
            edits = [rule.edits[role] for rule in recipe.layers if (role := Role.ACTIVATION) in rule.edits]
            slots = [recipe.activation, *(edit.apply(recipe.activation, recipe.activation) for edit in edits)]
            static = [slot for slot in slots if slot and not slot.spec.dynamic]
            found.setdefault(front(config), set()).update(needed(slot) for slot in static)
    return found


@dataclass(frozen=True)
class Work:
    """One job as it is handed to a process: everything it needs can be pickled.

    Args:
        also: statistics that other jobs will want.
        count: of all jobs.
    """

    row: Row
    config: _Config
    parent: str | None
    also: Mapping[str, Collection[type[Statistics]]]
    count: int


def carry_out(work: Work) -> Row:
    """Do one job, in whatever process, and return its row."""
    registry, session = _of_this_process()
    session.also = work.also
    console.notice(f"job {work.row.index + 1} of {work.count}: {work.row.varied}")
    _attempt(work.row, work.config, registry, work.parent, session)
    return work.row


def _failed(lost: Lost[Work]) -> Row:
    return replace(lost.task.row, status="failed", reason=lost.reason)


@cache
def _of_this_process() -> tuple[PluginRegistry, Session]:
    from qpipe.registry import PluginRegistry

    console.set_up_logs()
    return PluginRegistry.load_installed(), Session(several=True)


def _attempt(
    row: Row, config: _Config, registry: PluginRegistry, parent: str | None, session: Session
) -> None:
    """Run one job of a sweep; why it failed is printed and kept in its row, and the sweep goes on."""
    start = time.perf_counter()
    try:
        if has_several_processes(config["trainer"]) and not config["plan"]:
            report = earlier_run(config, registry, session, parent) or launch(row.words, config, parent)
        else:
            report = run_job(config, registry, parent, resume=True, session=session)
        row.status, row.reused, row.metrics = "finished", EARLIER in report.reused, report.metrics
    except GateError as error:
        console.error(error)
        row.status, row.reason, row.metrics = "missed", str(error), read_report(Path(config["out"])).metrics
    except QpipeError as error:
        console.error(error)
        row.status, row.reason = "failed", str(error)
    except Exception as error:  # a stranger's model or data may raise anything
        traceback.print_exc()
        row.status, row.reason = "failed", "".join(traceback.format_exception_only(error)).splitlines()[0]
    if not row.reused:
        row.seconds = time.perf_counter() - start


def plan_jobs(rows: Sequence[Row], configs: Sequence[_Config], registry: PluginRegistry) -> int:
    """Say what each job would do; return the exit code."""
    session = Session(several=True)
    for row, config in zip(rows, configs, strict=True):
        console.notice(f"job {row.index + 1} of {len(rows)}: {row.varied}")
        _attempt(row, config, registry, None, session)
    console.sweep(rows)
    return 4 if any(row.status == "failed" for row in rows) else 0


def chosen(config: _Config) -> dict[str, Any]:
    """Return what of a configuration a result depends on."""
    return {key: value for key, value in config.items() if key not in PLACE}


def open_sweep(rows: list[Row], what: object, out: str | None, command: str) -> Sweep:
    """Return the sweep of these jobs, as far as its folder says it was done.

    Args:
        what: plain data that makes it this sweep and no other.
        command: that made it.

    Raises:
        RecipeError: the folder holds something else.
    """
    name = digest(what, code_version())
    folder = Path(out or f"runs/sweep-{name[:12]}").expanduser().absolute()
    stored = _stored(folder, out)
    if stored and stored.get("id") != name:
        raise RecipeError(
            f"out={out or folder} holds a sweep of other jobs, or of another version of the code; "
            "choose another folder"
        )
    axes = {
        axis: list(dict.fromkeys(row.overrides[axis] for row in rows))
        for axis in (rows[0].overrides if rows else ())
    }
    earlier = {job["folder"]: job for job in stored.get("jobs", ())}
    sweep = Sweep(folder, name, command, axes, rows, parent=stored.get("parent"), earlier=earlier)
    for row in rows:
        sweep.place(row)
    return sweep


def _stored(folder: Path, out: str | None) -> dict[str, Any]:
    """Return what sweep.json of a folder says, {} for a folder that is empty or not there."""
    file = folder / FILE
    if file.is_file():
        stored: dict[str, Any] = json.loads(file.read_text())
        return stored
    if not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir()):
        run_folder(out or str(folder))
    return {}


def _rows(jobs: Sequence[Sequence[str]], flags: Sequence[str]) -> list[Row]:
    same = [word for word in jobs[0] if all(word in job for job in jobs)]
    rows = []
    for index, words in enumerate(jobs):
        own = [word for word in words if not word.startswith("out=")]
        pairs = (word.partition("=") for word in own if word not in same)
        overrides = {key.lstrip("+"): plain_value(value) for key, _, value in pairs}
        rows.append(Row(index, overrides, [*flags, *own], str(index), console.command([*flags, *own])))
    return rows


def plain_value(text: str) -> Any:  # noqa: ANN401
    """Return a word's value as plain data; what is no number and no truth value stays as it was typed."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _without_seed(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.overrides.items() if key != "seed"}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


@contextmanager
def only_one(sweep: Sweep) -> Iterator[None]:
    """Keep a second process off the sweep's folder, and clear what a killed one left half done."""
    from filelock import FileLock, Timeout

    sweep.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(sweep.folder / LOCK, blocking=False):
            for half in sweep.folder.glob(".*-*"):
                shutil.rmtree(half) if half.is_dir() else half.unlink()
            yield
    except Timeout:
        raise RecipeError(
            f"another process is running the sweep in {sweep.folder}; wait for it, or choose another out="
        ) from None

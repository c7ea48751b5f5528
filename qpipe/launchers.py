"""How the jobs of a sweep are carried out: one after the other, or in parallel processes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import yaml

from qpipe.errors import RecipeError
from qpipe.registry import suggest

CHOICE, KEYS = "hydra/launcher=", "hydra.launcher."
_EXTRAS = {"joblib": "parallel", "submitit": "slurm"}
_LOOK_S, _ASK_S = 0.5, 5.0  # between looks at result files; between questions to the queue
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Lost(Generic[T]):
    """A task whose process ended without a result: killed, or cancelled."""

    task: T
    reason: str


Launch = Callable[
    [Callable[[T], R], Sequence[T], Path], Iterator[R | Lost[T]]
]  # its own files go into the folder


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that choose a launcher, and the others."""
    chosen = [word for word in words if word.lstrip("+").startswith((CHOICE, KEYS))]
    return chosen, [word for word in words if word not in chosen]


def build_launcher(words: Sequence[str]) -> Launch[Any, Any]:
    """Return what the words choose: 'hydra/launcher=joblib hydra.launcher.n_jobs=4'.

    Raises:
        RecipeError: there is no such launcher or key, or its package is not installed.
    """
    name, options = "basic", {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key + "=" == CHOICE:
            name = value
        else:
            options[key.removeprefix(KEYS)] = yaml.safe_load(value)
    if name not in LAUNCHERS:
        raise RecipeError(
            f"no launcher named '{name}'{suggest(name, LAUNCHERS) or ';'} installed: {', '.join(LAUNCHERS)}"
        )
    return LAUNCHERS[name](options)


def _basic(options: Mapping[str, Any]) -> Launch[T, R]:
    """One job after the other, in this process."""
    if options:
        raise RecipeError(
            f"the jobs run one after the other; {KEYS}{next(iter(options))} needs {CHOICE}joblib"
        )

    def launch(work: Callable[[T], R], tasks: Sequence[T], folder: Path) -> Iterator[R | Lost[T]]:
        return map(work, tasks)

    return launch


def _joblib(options: Mapping[str, Any]) -> Launch[T, R]:
    """Parallel processes of this machine; keys are joblib.Parallel's."""
    joblib = _optional("joblib", "joblib")
    settings = {"n_jobs": -1, **options, "return_as": "generator_unordered"}
    try:
        joblib.Parallel(**settings)
    except TypeError as error:
        raise RecipeError(f"{CHOICE}joblib: {error}; its keys are those of joblib.Parallel") from None
    at_once = joblib.effective_n_jobs(settings["n_jobs"])
    reason = f"a parallel process was killed; is there memory for {KEYS}n_jobs={settings['n_jobs']}?"

    def launch(work: Callable[[T], R], tasks: Sequence[T], folder: Path) -> Iterator[R | Lost[T]]:
        left = dict(enumerate(tasks))
        while left:
            numbered = (joblib.delayed(_numbered)(work, index, task) for index, task in [*left.items()])
            try:
                for index, result in joblib.Parallel(**settings)(numbered):
                    del left[index]
                    yield result
            except BrokenProcessPool:  # one that is killed takes along those that ran beside it
                for index in [*left][:at_once]:
                    yield Lost(left.pop(index), reason)

    return launch


def _numbered(work: Callable[[T], R], index: int, task: T) -> tuple[int, R]:
    return index, work(task)


def _submitit(cluster: str) -> Callable[[Mapping[str, Any]], Launch[T, R]]:
    """Jobs of a cluster, or processes of this machine handled like them; keys are those of Hydra's plugin."""

    def build(options: Mapping[str, Any]) -> Launch[T, R]:
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")  # read on import, here and in the jobs
        submitit = _optional("submitit", f"submitit_{cluster}")
        with TemporaryDirectory() as anywhere:
            _executor(
                submitit, cluster, options, Path(anywhere)
            )  # a wrong key is said before anything is made

        def launch(work: Callable[[T], R], tasks: Sequence[T], folder: Path) -> Iterator[R | Lost[T]]:
            executor = _executor(submitit, cluster, options, folder / ".submitit")
            jobs = dict(zip(executor.map_array(Requeued(work), tasks), tasks, strict=True))
            try:
                yield from _results(jobs, _ended if cluster == "local" else _out_of_queue)
            finally:  # interrupted, or stopped at a failure
                for job in jobs:
                    job.cancel(check=False)

        return launch

    return build


def _executor(submitit: Any, cluster: str, options: Mapping[str, Any], folder: Path) -> Any:  # noqa: ANN401
    given = {"timeout_min": 60, "name": "qpipe", "max_num_timeout": 3, "submitit_folder": folder, **options}
    own = {"slurm_max_num_timeout": given.pop("max_num_timeout")}
    try:
        executor = submitit.AutoExecutor(given.pop("submitit_folder"), cluster, **own)
        general = executor._valid_parameters()
        known = {
            key if key in general else f"slurm_{key.removeprefix('slurm_')}": given[key] for key in given
        }
        executor.update_parameters(**known)
    except (TypeError, NameError, ValueError, RuntimeError, AssertionError) as error:
        raise RecipeError(f"{CHOICE}submitit_{cluster}: {str(error).splitlines()[0]}") from None
    return executor


class Requeued(Generic[T, R]):
    """Work that goes back into the queue when its job is told to stop: what it found out is kept."""

    def __init__(self, work: Callable[[T], R]) -> None:
        self.work = work

    def __call__(self, task: T) -> R:
        """Do the task."""
        return self.work(task)

    def checkpoint(self, task: T) -> Any:  # noqa: ANN401  # submitit's
        """Return what is to be done when the job starts again; one that was cancelled only ends."""
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the queue sends it once more
        job = JobEnvironment()
        if job.cluster == "slurm" and _ask_queue(job.job_id, "%T") not in ({"RUNNING"}, None):
            sys.exit(1)
        return DelayedSubmission(self, task)


def _results(jobs: dict[Any, T], gone: Callable[[Collection[Any]], set[Any]]) -> Iterator[Any]:
    """Yield results as they come and drop their jobs; one that is gone, without a result, is lost."""
    suspects: set[Any] = set()
    asked = time.monotonic()
    while jobs:
        ended = {job for job in jobs if job.paths.result_pickle.exists()}
        if not ended and time.monotonic() - asked > _ASK_S:
            missing = gone(jobs)
            ended, suspects, asked = missing & suspects, missing, time.monotonic()  # a file may come late
        for job in ended:
            yield _result(job, jobs.pop(job))
        if not ended:
            time.sleep(_LOOK_S)


def _result(job: Any, task: T) -> Any:  # noqa: ANN401  # submitit's
    reason = "it was killed"
    if job.paths.result_pickle.exists():
        try:
            return job.result()
        except Exception as error:  # submitit's, or what the task raised, as text
            reason = str(error).strip().splitlines()[-1]
    return Lost(task, f"job {job.job_id} has no result: {reason}; its log: {job.paths.stderr}")


def _ended(jobs: Collection[Any]) -> set[Any]:
    return {job for job in jobs if job.done()}


def _out_of_queue(jobs: Collection[Any]) -> set[Any]:
    queued = _ask_queue(",".join({job.job_id.partition("_")[0] for job in jobs}), "%i")
    return {job for job in jobs if queued is not None and job.job_id not in queued}


def _ask_queue(jobs: str, what: str) -> set[str] | None:
    """Return what squeue says of jobs that wait or run, a line each; None: it does not answer."""
    command = ["squeue", "--noheader", "--array", f"--jobs={jobs}", f"--format={what}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode and "Invalid job id" not in done.stderr:  # what it says of jobs that have long ended
        return None
    return set(done.stdout.split())


def _optional(module: str, launcher: str) -> Any:  # noqa: ANN401  # a module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise RecipeError(
            f"{CHOICE}{launcher} needs {module}, which is not installed; "
            f"install the extra: qpipe-quant[{_EXTRAS[module]}]"
        ) from None


LAUNCHERS: dict[str, Callable[[Mapping[str, Any]], Launch[Any, Any]]] = {
    "basic": _basic,
    "joblib": _joblib,
    "submitit_local": _submitit("local"),
    "submitit_slurm": _submitit("slurm"),
}

"""The tracking store: where it is, made once, asked once."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULTS = {  # of MLflow's own variables, where the user set none; a dead server held a run for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PROCESS_TAG = "qpipe.process"
_SQLITE = "sqlite:///"


def resolve(uri: str | None) -> str:
    """Return the store's address: the given one, MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    if chosen.startswith(_SQLITE):
        return _SQLITE + str(Path(chosen.removeprefix(_SQLITE)).absolute())
    return chosen


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id, both made if need be; whoever comes first makes the store.

    Raises:
        Exception: whatever MLflow raises when the store does not answer.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    with _one_at_a_time(uri):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, str(found.experiment_id)
        return client, str(client.create_experiment(experiment, artifact_location=_artifacts(uri)))


def process_tag() -> str:
    """Return what names this process: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def reconcile(client: MlflowClient, experiment_id: str) -> None:
    """Mark runs as killed whose process on this host is gone."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=100):
        host, _, pid = run.data.tags.get(PROCESS_TAG, "").rpartition(":")
        if host == socket.gethostname() and not _alive(int(pid)):
            client.set_terminated(run.info.run_id, "KILLED")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _artifacts(uri: str) -> str | None:
    """Return the folder beside an SQLite file; a server decides for itself."""
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri()


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Keep other processes from making the same SQLite store: of four that tried at once, three died."""
    if not uri.startswith(_SQLITE):
        yield
        return
    from filelock import FileLock

    Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"qpipe-mlflow-{digest}.lock", timeout=120):
        yield


# What MLflow says of itself: (category, pattern of the message).
_KNOWN_NOISE: tuple[tuple[type[Warning], str], ...] = (
    (DeprecationWarning, ""),  # its own use of SQLAlchemy and pydantic
    (UserWarning, r"(?s).*[Tt]ype hint"),  # the hints of its own classes, and of code that is stored
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out MLflow's known noise, and the hundred lines about the tables it makes."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.pyfunc", "mlflow.store.db.utils")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for category, message in _KNOWN_NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

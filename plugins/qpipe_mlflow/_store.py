"""The tracking store: where it is, made once, asked once."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULTS = {  # of MLflow's own variables, where the user set none; a dead server held a run for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # two tries, 20 s and a pause: a run waits 30 s at most
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # however long a proxy says
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the tracker says where to look
}
_PROBE_S, _SILENCE_S = 3.0, 300.0
_silent_until: dict[str, float] = {}
_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs")
log = logging.getLogger("qpipe")
PROCESS_TAG = "qpipe.process"
_SQLITE = "sqlite:///"


def resolve(uri: str | None) -> str:
    """Return the store's address: the given one, MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    if chosen.startswith(_SQLITE):
        return _SQLITE + str(Path(chosen.removeprefix(_SQLITE)).absolute())
    return chosen


class SilentError(OSError):
    """A server did not answer a moment ago, which was said."""


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id, both made if need be; whoever comes first makes the store.

    Raises:
        Exception: whatever MLflow raises when the store does not answer.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    probe(uri)
    warn_of_network(uri)
    from mlflow import MlflowClient

    with _one_at_a_time(uri):
        _make(uri)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, str(found.experiment_id)
        return client, str(client.create_experiment(experiment, artifact_location=_artifacts(uri)))


def probe(uri: str) -> None:
    """Ask a server once whether it is there; one that was not is not asked again for a while.

    Raises:
        OSError: it is not.
    """
    if not uri.startswith(("http://", "https://")):
        return
    if time.monotonic() < _silent_until.get(uri, 0.0):
        raise SilentError("it did not answer a moment ago")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PROBE_S):  # noqa: S310  # http only
            pass
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        silence(uri, error)
        raise


def silence(uri: str, error: BaseException | None) -> None:
    """Ask a server nothing more for a while, if an error says that it could not be reached."""
    while error is not None and not isinstance(error, OSError):  # as those of requests are
        error = error.__cause__ or error.__context__
    if error is not None and not isinstance(error, SilentError) and uri.startswith("http"):
        _silent_until[uri] = time.monotonic() + _SILENCE_S


def network_filesystem(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the kind of network file system a path lies on, None for a disk of this machine."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    holding = [line for line in lines if len(line) > 2 and path.is_relative_to(_unescaped(line[1]))]
    kind = max(holding, key=lambda line: len(_unescaped(line[1])), default=["", "", ""])[2]
    return kind if kind.startswith(_NETWORK) else None


def _unescaped(mount_point: str) -> str:
    return mount_point.replace("\\040", " ")


@functools.cache
def warn_of_network(uri: str, mounts: Path = Path("/proc/mounts")) -> None:
    """Say once what to do about SQLite on a network file system, whose locks do not hold."""
    if not uri.startswith(_SQLITE):
        return
    path = Path(uri.removeprefix(_SQLITE))
    if kind := network_filesystem(path.resolve(), mounts):
        log.warning(
            "%s lies on %s, where parallel writers damage an SQLite file; keep it on a local disk "
            "(tracker.uri=sqlite:////tmp/mlflow.db), or run 'mlflow server' and give tracker.uri its address",
            path,
            kind,
        )


def _make(uri: str) -> None:
    """Make an SQLite store aside and move it into place: who is killed meanwhile leaves no half of one."""
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    from mlflow import MlflowClient

    for half in path.parent.glob(f".{path.name}-*"):
        half.unlink()
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    MlflowClient(f"{_SQLITE}{aside}").search_experiments(max_results=1)
    os.replace(aside, path)


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

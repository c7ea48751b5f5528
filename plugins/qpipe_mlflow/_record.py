"""What of a run goes into the store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe import QpipeError
from qpipe.gate import Gate

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPORT_TAG = "qpipe.report"
SPOOL = "unrecorded.json"  # in a run's folder: what else its run lacks
Point = tuple[str, float, int, int]  # of a curve: metric, value, time in ms, step
_BATCH = 100  # parameters MLflow takes at once
_POINTS = 1000  # metrics
_LONGEST = 6000  # characters of a parameter


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every value of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield metric_name(f"{prefix}{key}"), str(value)[:_LONGEST]


def log_config(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """Log a configuration as parameters."""
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in flatten(config)]
    for start in range(0, len(params), _BATCH):
        client.log_batch(run_id, params=params[start : start + _BATCH])


def log_folder(
    client: MlflowClient, run_id: str, folder: Path, serve: bool, registered: str | None = None
) -> None:
    """Log a finished run's folder: metrics as '<variant>.<metric>', curves, tables, files, a model to serve.

    Doing it twice gives the same: metrics carry the time at which the run finished.

    Args:
        registered: name under which the model is registered; it becomes the candidate if the run has a gate
            and meets it.
    """
    client.set_tag(run_id, REPORT_TAG, digest(folder))
    report = json.loads((folder / "report.json").read_text())
    time_ms = _time_ms(report)
    points = [
        (metric_name(f"{variant}.{name}"), float(value), time_ms, 0)
        for variant, values in report["metrics"].items()
        for name, value in values.items()
    ]
    log_points(client, run_id, [*points, *map(tuple, read_spool(folder)["curves"])])
    for path in sorted(folder.iterdir()):
        if path.name != SPOOL:
            client.log_artifact(run_id, str(path))
    for name in ("edges", "weights"):
        if rows := report.get(name):
            client.log_dict(run_id, _table(rows), f"tables/{name}.json")
    if serve or registered:
        _log_served(client, run_id, folder, report, registered)


def log_points(client: MlflowClient, run_id: str, points: Sequence[Point]) -> None:
    """Log points of curves; one that is there already is not logged again."""
    from mlflow.entities import Metric

    for start in range(0, len(points), _POINTS):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points[start : start + _POINTS]])


def write_spool(folder: Path, run_id: str | None, curves: Sequence[Point]) -> None:
    """Keep beside a run what a store did not take: the id of its open run, and points of curves."""
    (folder / SPOOL).write_text(json.dumps({"run": run_id, "curves": curves}) + "\n")


def read_spool(folder: Path) -> dict[str, Any]:
    """Return what was kept, nothing where everything was recorded."""
    file = folder / SPOOL
    spool: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"run": None, "curves": []}
    return spool


def digest(folder: Path) -> str:
    """Return what names the record of a run."""
    return hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as MLflow's page shows a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def _log_served(
    client: MlflowClient, run_id: str, folder: Path, report: Mapping[str, Any], registered: str | None
) -> None:
    from qpipe_mlflow._model import log_model, register

    for artifact in report["artifacts"]:
        if artifact["path"].endswith(".onnx"):
            model_id = log_model(client, run_id, folder / artifact["path"])
            if registered:
                register(client, run_id, model_id, registered, _accepted(folder, report))
            return


def _accepted(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the run has a gate, and meets it."""
    file = folder / "config.yaml"
    gate = Gate(**(yaml.safe_load(file.read_text()).get("gate") or {})) if file.is_file() else Gate()
    if gate.is_open:
        return False
    try:
        gate.check({v: {k: float(x) for k, x in row.items()} for v, row in report["metrics"].items()})
    except QpipeError:
        return False
    return True


def _time_ms(report: Mapping[str, Any]) -> int:
    finished = report.get("environment", {}).get("finished", "1970-01-01T00:00:00+00:00")
    return int(datetime.fromisoformat(finished).timestamp() * 1000)


def metric_name(text: str) -> str:
    """Return a name of the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]

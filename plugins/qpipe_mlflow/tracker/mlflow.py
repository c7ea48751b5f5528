"""Record runs in MLflow."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe import PluginError, RecipeError, Report, Tracker, hookimpl
from qpipe_mlflow._record import (
    REPORT_TAG,
    SPOOL,
    digest,
    log_config,
    log_folder,
    read_spool,
    write_spool,
)
from qpipe_mlflow._store import (
    PROCESS_TAG,
    SilentError,
    connect,
    probe,
    process_tag,
    quiet,
    reconcile,
    resolve,
    silence,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pytorch_lightning.loggers import Logger

    from qpipe_mlflow._curves import Curves

log = logging.getLogger("qpipe")


class MLflowTracker(Tracker):
    """Record parameters, metrics, files and a model that can be served.

    The store is SQLite in the working folder unless uri or MLFLOW_TRACKING_URI names another. When it does
    not answer, the run goes on and asks it nothing more; the folder holds everything, what else the store
    lacks in unrecorded.json, and `qpipe sync folder` records it later.

    Args:
        uri: of the tracking store.
        experiment: name of the experiment.
        serve: log the ONNX file as a model for `mlflow models serve`.
        register: name under which the model is registered; its version gets the alias 'candidate' when the
            run has a gate and meets it.
    """

    name = "mlflow"

    def __init__(
        self,
        uri: str | None = None,
        experiment: str = "qpipe",
        serve: bool = True,
        register: str | None = None,
    ) -> None:
        self.uri = resolve(uri)
        self.experiment = experiment
        self.serve = serve
        self.register = register
        self.client: MlflowClient | None = None
        self.experiment_id = ""
        self.run_id: str | None = None
        self.curves: Curves | None = None

    @quiet()
    def start_sweep(self, config: Mapping[str, Any], earlier: str | None = None) -> str | None:
        """Open the parent run of a sweep, or go on with the earlier one; None: the store does not answer."""
        return self._reopen(earlier) if earlier else self._open(config, {"qpipe.sweep": "true"})

    @quiet()
    def finish_sweep(self, parent: str, status: str, folder: Path) -> str | None:
        """Record the sweep's tables and page, and close the parent run; return where to look."""
        self.run_id = parent
        try:
            if self.client is None:
                self._connect()
            assert self.client is not None  # noqa: S101  # connected just now
            probe(self.uri)
            for file in sorted(folder.glob("sweep.*")):
                self.client.log_artifact(parent, str(file))
            self.client.set_terminated(parent, status.upper())
        except Exception as error:  # whatever a store raises
            self._lost(error)
            return f"not recorded; later: qpipe sync {folder}"
        if any(folder.glob(f"*/{SPOOL}")):  # of a job, perhaps in another process
            return f"not recorded completely; later: qpipe sync {folder}"
        return self._where()

    @quiet()
    def start(self, config: Mapping[str, Any], parent: str | None = None) -> Logger:
        """Open a run; a store that does not answer is a warning."""
        from qpipe_mlflow._curves import Curves

        self._open(config, _child_of(parent))
        self.curves = Curves(self.client, self.run_id, self._lost)
        return self.curves

    @quiet()
    def finish(self, report: Report | None, folder: Path | None, status: str) -> str | None:
        """Record the run's folder and close the run; return the command or the page that shows it."""
        written = folder if folder is not None and (folder / "report.json").is_file() else None
        if self.client is None or self.run_id is None:
            return self._spooled(written) if written else None
        try:
            probe(self.uri)  # a server that died meanwhile is not waited for at every call
            if written:
                log_folder(self.client, self.run_id, written, self.serve, self.register)
            self.client.set_terminated(self.run_id, status.upper())
        except Exception as error:  # whatever a store raises
            self._lost(error)
            return self._spooled(written) if written else None
        return self._where()

    @quiet()
    def sync(self, folder: Path, parent: str | None = None) -> str:
        """Record a finished run's folder, once; return where it is shown.

        Raises:
            PluginError: the folder holds no report, or the store does not answer.
        """
        if not (folder / "report.json").is_file():
            raise PluginError(f"{folder} holds no report.json; give the folder of a finished run")
        try:
            self._connect()
            self._record_once(folder, parent)
        except Exception as error:
            silence(self.uri, error)
            raise PluginError(f"tracking store {self.uri} does not answer: {_first_line(error)}") from None
        with suppress(OSError):  # a folder that one may only read
            (folder / SPOOL).unlink(missing_ok=True)
        return self._where()

    @quiet()
    def fetch(self, run: str, names: Sequence[str], folder: Path) -> None:
        """Download those of a run's files that are named, and there.

        Raises:
            RecipeError: the store knows no such run, or does not answer.
        """
        if not re.fullmatch("[0-9a-f]{32}", run):
            raise RecipeError(f"no folder is named '{run}', and an MLflow run has 32 hexadecimal digits")
        try:
            self._connect()
            assert self.client is not None  # noqa: S101  # connected just now
            found = {item.path for item in self.client.list_artifacts(run)}
            for name in found.intersection(names):
                self.client.download_artifacts(run, name, str(folder))
        except Exception as error:  # whatever a store raises
            raise RecipeError(
                f"no folder is named '{run}', and {self.uri} has no such run: {_first_line(error)}"
            ) from None

    def _record_once(self, folder: Path, parent: str | None) -> None:
        assert self.client is not None  # noqa: S101  # connected just now
        config_file = folder / "config.yaml"
        config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
        if (earlier := self._earlier(folder)) is None:
            self.run_id = self._create(config, _child_of(parent))
        else:
            self.run_id = str(earlier.info.run_id)
            if earlier.info.status == "FINISHED":
                return
            log_config(self.client, self.run_id, config)
        log_folder(self.client, self.run_id, folder, self.serve, self.register)
        self.client.set_terminated(self.run_id, "FINISHED")

    def _earlier(self, folder: Path) -> Run | None:
        """Return the run that a folder was recorded in, or that was opened for it."""
        assert self.client is not None  # noqa: S101  # connected just now
        name, opened = digest(folder), read_spool(folder)["run"]
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{REPORT_TAG}` = '{name}'", max_results=1
        )
        if found:
            return found[0]
        own = f"attributes.run_id = '{opened}'"
        runs = self.client.search_runs([self.experiment_id], own) if opened else []
        return runs[0] if runs and REPORT_TAG not in runs[0].data.tags else None

    def _connect(self) -> None:
        self.client, self.experiment_id = connect(self.uri, self.experiment)

    def _open(self, config: Mapping[str, Any], tags: Mapping[str, str]) -> str | None:
        try:
            self._connect()
            return self._create(config, tags)
        except Exception as error:  # whatever a store raises
            self._lost(error)
        return None

    def _reopen(self, earlier: str) -> str | None:
        try:
            self._connect()
            assert self.client is not None  # noqa: S101  # connected just now
            reconcile(self.client, self.experiment_id)
            self.client.set_tag(earlier, PROCESS_TAG, process_tag())
            self.client.update_run(earlier, "RUNNING")
            self.run_id = earlier
        except Exception as error:  # whatever a store raises
            self._lost(error)
        return self.run_id

    def _create(self, config: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        assert self.client is not None  # noqa: S101
        reconcile(self.client, self.experiment_id)
        run = self.client.create_run(self.experiment_id, tags={PROCESS_TAG: process_tag(), **tags})
        self.run_id = str(run.info.run_id)
        log_config(self.client, self.run_id, config)
        return self.run_id

    def _lost(self, error: Exception) -> None:
        self.client = None
        silence(self.uri, error)
        if not isinstance(error, SilentError):
            log.warning(
                "tracking store %s does not answer (%s); the run goes on, its folder can be recorded later",
                self.uri,
                _first_line(error),
            )

    def _spooled(self, folder: Path) -> str:
        """Keep what the store did not take; return how it is recorded later."""
        try:
            write_spool(folder, self.run_id, self.curves.kept if self.curves else ())
        except OSError as error:
            log.warning("curves are not kept: %s", error)
        return f"not recorded{' completely' if self.run_id else ''}; later: qpipe sync {folder}"

    def _where(self) -> str:
        if self.uri.startswith(("http://", "https://")):
            return f"{self.uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {self.uri}"


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    cause = re.search(r"Caused by \w+\(.*?: (.*?)[\"']?\)+$", text)  # of five nested ones
    return cause[1] if cause else text


def _child_of(parent: str | None) -> dict[str, str]:
    return {"mlflow.parentRunId": parent} if parent else {}


@hookimpl
def qpipe_register_tracker() -> list[type[Tracker]]:
    """Offer MLflow."""
    return [MLflowTracker]

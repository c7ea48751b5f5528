"""MLflow's own server, in this process, that answers until one kind of request and from then on nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from qpipe_mlflow import _store
from qpipe_mlflow._store import quiet
from qpipe_mlflow.tracker.mlflow import MLflowTracker

from qpipe import Report

CONFIG = {"weight": {"num_bits": 8, "calibrator": None}, "tracker": {"name": "mlflow"}, "layers": []}
pytestmark = pytest.mark.filterwarnings("ignore")  # the server's own
_Wsgi = Callable[[dict[str, Any], Any], Any]


class Stalling:
    """A server that stalls.

    Args:
        at: what the first request that is not answered contains; it is done nonetheless.
    """

    def __init__(self, app: _Wsgi) -> None:
        self.app = app
        self.at: str | None = None
        self.stalled: list[str] = []
        self.over = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:  # noqa: ANN401
        path = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if path.endswith("/health") or not (self.stalled or (self.at and self.at in path)):
            return self.app(environ, start_response)
        self.stalled.append(path)
        answer = [] if self.stalled[1:] else self.app(environ, start_response)
        self.over.wait(60)
        return answer or start_response("503 Unavailable", []) and []

    def stall(self, at: str | None) -> None:
        """Stall at a request to come; None: answer again."""
        self.over.set()
        self.at, self.stalled, self.over = at, [], threading.Event()
        _store._silent_until.clear()  # minutes pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Stalling]]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder / 'server.db'}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(folder / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        from mlflow.server import app, handlers
        from werkzeug.serving import make_server

        for name in ("_tracking_store", "_model_registry_store", "_artifact_repo"):
            patch.setattr(handlers, name, None)
        patch.setenv("MLFLOW_TRACKING_URI", "")  # a server sets it and these two for its whole process
        for module, name in (("_tracking_service", "_tracking_uri"), ("_model_registry", "_registry_uri")):
            patch.setattr(f"mlflow.tracking.{module}.utils.{name}", None)
        handlers.initialize_backend_stores()
        stalling = Stalling(app)
        http = make_server("127.0.0.1", 0, stalling, threaded=True)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", stalling
        stalling.stall(None)
        http.shutdown()
        thread.join()


WRITES = [
    "runs/create",
    "runs/log-batch",
    "runs/set-tag",
    "PUT",
    "logged-models",
    "registered-models/create",
    "model-versions/create",
    "registered-models/alias",
    "runs/update",
]


@pytest.mark.parametrize("at", WRITES)
def test_a_server_that_stalls_at_a_write(
    at: str,
    server: tuple[str, Stalling],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, stalling = server
    name = at.replace("/", "-")
    config = {**CONFIG, "gate": {"max_drop": 1.0}}
    (folder / "config.yaml").write_text(json.dumps(config))

    def tracker() -> MLflowTracker:
        return MLflowTracker(address, experiment=name, register=name)

    with quiet():
        client = MlflowClient(address)
        client.create_experiment(name)
    stalling.stall(at)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = tracker()
    run.start(config).log_metrics({"loss": 0.5}, 3)
    assert run.finish(Report({}, folder=folder), folder, "finished").endswith(f"later: qpipe sync {folder}")
    assert len(stalling.stalled) <= 1  # outside tests one takes two tries of 10 s
    assert len([r for r in caplog.records if r.name == "qpipe"]) == 1

    stalling.stall(None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    for _ in range(2):
        tracker().sync(folder)
    with quiet():
        experiment = client.get_experiment_by_name(name).experiment_id
        (found,) = client.search_runs([experiment], "attributes.status = 'FINISHED'")
        assert found.data.params["weight.num_bits"] == "8"
        assert (found.data.metrics["loss"], found.data.metrics["onnx.latency_ms"]) == (0.5, 0.1)
        assert len(client.get_metric_history(found.info.run_id, "loss")) == 1
        assert {"report.json", "onnx", "tables"} <= {x.path for x in client.list_artifacts(found.info.run_id)}
        (model,) = client.search_logged_models([experiment])
        assert str(model.status) == "READY"
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert client.get_model_version_by_alias(name, "candidate").version == version.version
    assert not (folder / "unrecorded.json").exists()

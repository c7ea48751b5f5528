"""A server on loopback that accepts the probe and then stalls, having done what it was asked or not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from qpipe_mlflow import _store
from qpipe_mlflow._store import quiet
from qpipe_mlflow.tracker.mlflow import MLflowTracker

from qpipe import Report

CONFIG = {"weight": {"num_bits": 8}, "tracker": {"name": "mlflow"}, "gate": {"max_drop": 1.0}}
WRITES = ["runs/create", "runs/log-batch", "PUT", "logged-models/", "registered-models/create", "runs/update"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running server."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, str(Path(__file__).with_name("stalling_server.py")), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (folder / "port").exists():
            assert process.poll() is None, "the server did not come up"
            time.sleep(0.05)
        yield folder
        process.kill()


@pytest.mark.parametrize("at", WRITES)
def test_a_stalling_server_loses_nothing(
    at: str, server: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{(server / 'port').read_text()}"
    name = at.strip("/").replace("/", "-")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")

    def tracker() -> MLflowTracker:
        return MLflowTracker(address, experiment=name, register=name)

    with quiet():
        client = MlflowClient(address)
        experiment = client.create_experiment(name)
        client.search_runs([experiment])  # a first search imports what takes a second
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (server / "stall_at").write_text(at)
    run = tracker()
    run.start(CONFIG).log_metrics({"loss": 0.5}, 3)
    said = run.finish(Report({}, folder=folder), folder, "finished")
    assert str(said).endswith(f"later: qpipe sync {folder}")
    stalled = (server / "stalled").read_text().splitlines() if (server / "stalled").exists() else []
    assert len(stalled) <= 1  # outside tests, one takes two tries of 10 s
    assert len([r for r in caplog.records if r.name == "qpipe"]) == 1

    (server / "stall_at").unlink()
    (server / "stalled").unlink(missing_ok=True)
    _store._silent_until.clear()  # minutes pass
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    for _ in range(2):
        tracker().sync(folder)
    with quiet():
        (found,) = client.search_runs([experiment], "attributes.status = 'FINISHED'")
        assert found.data.params["weight.num_bits"] == "8"
        assert found.data.metrics["onnx.latency_ms"] == 0.1
        assert [x.value for x in client.get_metric_history(found.info.run_id, "loss")] == [0.5]
        assert {"report.json", "onnx", "tables"} <= {x.path for x in client.list_artifacts(found.info.run_id)}
        (model,) = client.search_logged_models([experiment])
        assert str(model.status) == "READY"
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert client.get_model_version_by_alias(name, "candidate").version == version.version
    assert not (folder / "unrecorded.json").exists()

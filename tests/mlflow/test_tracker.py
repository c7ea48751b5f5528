"""The real MLflow, on SQLite in a temporary folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from qpipe_mlflow._store import PROCESS_TAG, connect, network_filesystem, quiet, resolve, warn_of_network
from qpipe_mlflow.tracker.mlflow import MLflowTracker

from qpipe import PluginError, RecipeError, Report

CONFIG = {"weight": {"num_bits": 8, "calibrator": None}, "tracker": {"name": "mlflow"}, "layers": []}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    with quiet():
        return connect(uri, "qpipe")[0]


def test_a_run_is_recorded_under_its_parent_and_can_be_served(
    uri: str, client: MlflowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = MLflowTracker(uri)
    parent = sweep.start_sweep(CONFIG)
    tracker = MLflowTracker(uri)
    logger = tracker.start(CONFIG, parent)
    logger.log_metrics({"loss": 0.5}, 3)
    logger.finalize("success")
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    where = tracker.finish(Report({}, folder=folder), folder, "finished")
    (folder / "sweep.html").write_text("a page")
    sweep.finish_sweep(parent, "failed", folder)

    run = client.get_run(tracker.run_id)
    assert where == f"mlflow ui --backend-store-uri {uri}"
    assert run.info.status == "FINISHED"
    assert client.get_run(parent).info.status == "FAILED"
    assert [item.path for item in client.list_artifacts(parent)] == ["sweep.html"]
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.params["weight.num_bits"] == "8"
    assert run.data.metrics == {
        "loss": 0.5,
        "fp32.top1_percent": 99.4,
        "onnx.top1_percent": 99.2,
        "onnx.latency_ms": 0.1,
    }
    paths = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.json", "config.yaml", "onnx", "tables"} <= paths
    fetched = folder / "fetched"
    fetched.mkdir()
    MLflowTracker(uri).fetch(run.info.run_id, ("report.json", "samples.safetensors"), fetched)
    assert [file.name for file in fetched.iterdir()] == ["report.json"]
    for wrong, why in (("nothing", "32 hexadecimal digits"), ("0" * 32, "has no such run")):
        with pytest.raises(RecipeError, match=why):
            tracker.fetch(wrong, (), fetched)
    table = client.download_artifacts(run.info.run_id, "tables/edges.json", str(folder))
    assert json.loads(Path(table).read_text()) == {"columns": ["name", "num_bits"], "data": [["input", 8]]}
    import mlflow.pyfunc  # warns when imported; the tracker imported it quietly

    (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", uri)
    served = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    np.testing.assert_array_equal(served.predict(np.ones((2, 3), np.float32))["y"], 2 * np.ones((2, 3)))
    assert served.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 3)
    assert served.input_example is not None
    local = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(folder / "served"))
    file = next(Path(local).rglob("model.onnx"))
    file.write_bytes(file.read_bytes().replace(b"Add", b"Mul"))
    with pytest.raises(Exception, match="not the one this model was stored with"):
        mlflow.pyfunc.load_model(local)


def test_a_model_of_several_inputs_answers_like_its_file(tmp_path: Path) -> None:
    """Tokens and a mask: by name, in whatever order, any number of rows, equal to what qpipe.load runs."""
    import onnx
    from onnx import TensorProto, helper
    from qpipe_mlflow._model import save_model
    from qpipe_onnx._runtime import OnnxRuntimeModule, describe_call

    from qpipe.calls import Index

    names, sizes = ("tokens", "mask"), ["batch", "length"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, sizes) for name in names]
    output = helper.make_tensor_value_info("difference", TensorProto.INT64, sizes)
    graph = helper.make_graph([helper.make_node("Sub", [*names], ["difference"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, describe_call(names, Index(0), 1))
    onnx.save(model, tmp_path / "model.onnx")
    file = OnnxRuntimeModule.open(tmp_path / "model.onnx")
    with quiet(), save_model(tmp_path / "model.onnx") as folder:
        import mlflow.pyfunc

        served = mlflow.pyfunc.load_model(str(folder))
        for rows in (1, 3):
            given = {name: torch.randint(9, (rows, 4)) for name in names}
            answer = served.predict({name: given[name].numpy() for name in reversed(names)})
            np.testing.assert_array_equal(answer["difference"], file(**given).numpy())


def test_sync_records_once(uri: str, client: MlflowClient, folder: Path) -> None:
    experiment = client.get_experiment_by_name("qpipe").experiment_id
    before = len(client.search_runs([experiment]))
    tracker = MLflowTracker(uri, serve=False)
    tracker.sync(folder)
    again = MLflowTracker(uri, serve=False)
    again.sync(folder)
    assert again.run_id == tracker.run_id
    assert len(client.search_runs([experiment])) == before + 1
    run = client.get_run(tracker.run_id)
    assert run.data.metrics["onnx.latency_ms"] == 0.1
    assert run.data.params["weight.num_bits"] == "8"
    with pytest.raises(PluginError, match=r"holds no report\.json"):
        tracker.sync(folder / "onnx")


def test_a_run_whose_process_died_is_marked_killed(uri: str, client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("qpipe").experiment_id
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    tags = {PROCESS_TAG: f"{socket.gethostname()}:{dead.pid}"}
    stale = client.create_run(experiment, tags=tags).info.run_id
    elsewhere = client.create_run(experiment, tags={PROCESS_TAG: f"another-host:{dead.pid}"}).info.run_id
    tracker = MLflowTracker(uri)
    tracker.start(CONFIG)
    assert client.get_run(stale).info.status == "KILLED"
    assert client.get_run(elsewhere).info.status == "RUNNING"
    tracker.finish(None, None, "killed")
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_dead_server_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    tracker = MLflowTracker(f"http://127.0.0.1:{port}")
    tracker.start(CONFIG).log_metrics({"loss": 0.5}, 3)
    assert tracker.finish(Report({}, folder=folder), folder, "finished") == (
        f"not recorded; later: qpipe sync {folder}"
    )
    assert time.monotonic() - start < 30
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1
    assert json.loads((folder / "unrecorded.json").read_text())["curves"][0][:2] == ["loss", 0.5]
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name)  # setdefault of the tracker, not for other tests


def test_the_users_own_limits_stay(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    connect(uri, "qpipe")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_the_store_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve(None) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert resolve("sqlite:///sub/x.db") == f"sqlite:///{tmp_path / 'sub' / 'x.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve(None) == "http://server:5000"
    assert resolve("http://other") == "http://other"


def test_a_store_that_dies_stops_no_training(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MLflowTracker(uri)
    logger = tracker.start(CONFIG)
    MlflowClient(uri).delete_run(tracker.run_id)
    logger.log_metrics({"loss": torch.tensor(1.0).item()}, 0)
    logger.log_metrics({"loss": 2.0}, 1)
    assert [r.message for r in caplog.records if "does not answer" in r.message] != []


def test_a_model_is_registered_and_accepted_by_its_gate(
    uri: str, client: MlflowClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"  # what MLflow itself would take
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", elsewhere)

    def recorded(**gate: float) -> tuple[str, MLflowTracker]:
        stored = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**stored, "gate": gate}))  # another run
        (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "gate": gate}))
        tracker = MLflowTracker(uri, register="digits")
        tracker.sync(folder)
        tracker.sync(folder)
        return str(tracker.run_id), tracker

    def candidate() -> object:
        return client.get_registered_model("digits").aliases.get("candidate")

    recorded()
    assert candidate() is None  # nobody asked
    recorded(max_drop=0.1)
    assert candidate() is None  # 99.4 - 99.2 is more
    run_id, _ = recorded(max_drop=1.0)
    assert str(candidate()) == "3"
    assert client.get_model_version("digits", "3").run_id == run_id
    assert len(client.search_model_versions("name = 'digits'")) == 3


def test_a_server_that_hangs_costs_one_probe(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qpipe_mlflow._store._PROBE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts and never answers
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        start = time.monotonic()
        for _ in range(3):  # three jobs of a sweep
            tracker = MLflowTracker(address)
            tracker.start(CONFIG)
            said = tracker.finish(Report({}, folder=folder), folder, "finished")
            assert said == f"not recorded; later: qpipe sync {folder}"
        assert time.monotonic() - start < 3
    assert "does not answer" in caplog.text


def test_sqlite_on_a_network_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n"
        "/dev/vdb /home/me/disk ext4 rw 0 0\nserver:/x /my\\040share cifs rw 0 0\n"
    )
    assert network_filesystem(Path("/home/me/work"), mounts) == "nfs4"
    assert network_filesystem(Path("/home/me/disk/work"), mounts) is None
    assert network_filesystem(Path("/my share/work"), mounts) == "cifs"
    assert network_filesystem(Path("/tmp"), mounts) is None
    assert network_filesystem(Path("/tmp"), tmp_path / "no file") is None
    warn_of_network("sqlite:////home/me/mlflow.db", mounts)
    warn_of_network("http://server", mounts)
    (said,) = [record.message for record in caplog.records]
    assert "lies on nfs4" in said
    assert "tracker.uri=" in said

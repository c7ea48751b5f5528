"""A real server on loopback: recorded, lost in the middle, recorded later once; a model that answers."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from qpipe_mlflow import _store
from qpipe_mlflow._store import quiet
from qpipe_mlflow.tracker.mlflow import MLflowTracker

import qpipe
from qpipe import Report
from qpipe.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], health: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server in a process group of its own, wait until it answers, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(3000):
            try:
                with urllib.request.urlopen(health, timeout=1):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"{command} did not come up")
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_dies_loses_nothing(tmp_path: Path, folder: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    database = f"sqlite:///{tmp_path / 'server.db'}"
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", database]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    with running(command, f"{address}/health"):
        tracker = MLflowTracker(address, register="digits")
        logger = tracker.start(yaml.safe_load((folder / "config.yaml").read_text()))
        logger.log_metrics({"loss": 1.0}, 0)
    start = time.monotonic()
    logger.log_metrics({"loss": 0.5}, 1)  # while it is dead
    assert tracker.finish(Report({}, folder=folder), folder, "finished") == (
        f"not recorded completely; later: qpipe sync {folder}"
    )
    assert time.monotonic() - start < 30
    _store._silent_until.clear()  # minutes pass
    with running(command, f"{address}/health"):
        for _ in range(2):
            MLflowTracker(address, register="digits").sync(folder)
        with quiet():
            client = MlflowClient(address)
            experiment = client.get_experiment_by_name("qpipe")
            runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
            assert [run.data.metrics["onnx.latency_ms"] for run in runs] == [0.1]
            assert len(client.search_model_versions("name = 'digits'")) == 1


def test_a_run_is_served_as_it_was_measured(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["evaluator=[accuracy]", "exporter=[onnx]", f"out={tmp_path / 'run'}", f"tracker.uri={store}"]
    assert main([*words, "tracker.register=digits", "gate.max_drop=100"]) == 0
    asked = {batch: np.random.default_rng(batch).random((batch, 1, 8, 8), np.float32) for batch in (1, 5)}
    port = free_port()
    serve = [
        "models",
        "serve",
        "-m",
        "models:/digits@candidate",
        "--env-manager",
        "local",
        "--port",
        str(port),
    ]
    with running(serve, f"http://127.0.0.1:{port}/health", MLFLOW_TRACKING_URI=store):
        answers = {batch: answer(port, {"inputs": {"x": x.tolist()}}) for batch, x in asked.items()}
    loaded = qpipe.load(tmp_path / "run")
    with quiet():
        (model,) = MlflowClient(store).search_model_versions("name = 'digits'")
        pyfunc = importlib.import_module("mlflow.pyfunc").load_model(model.source)
    for batch, x in asked.items():
        (name, predictions), *others = answers[batch].items()
        assert not others
        served = np.asarray(predictions, np.float32)
        assert served.shape == (batch, 10)
        np.testing.assert_array_equal(served, loaded(torch.from_numpy(x)).numpy())
        np.testing.assert_array_equal(served, pyfunc.predict({"x": x})[name])


def answer(port: int, request: Any) -> Any:  # noqa: ANN401
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.loads(reply.read())["predictions"]

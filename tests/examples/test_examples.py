"""A user's own model, data and task, named by `_target_` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qpipe import Task

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def train(model: nn.Module, data: Any, task: Task, epochs: int, lr: float) -> nn.Module:  # noqa: ANN401
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for batch in data.train_dataloader():
            args, kwargs = task.inputs(batch)
            task.loss(model(*args, **kwargs), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def command(folder: Path, *words: str) -> dict[str, Any]:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    words = (*words, "evaluator=[accuracy,sqnr,size]", "tracker=null", f"out={folder / 'run'}")
    done = subprocess.run(
        [sys.executable, "-m", "qpipe", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bert_classifier(tmp_path: Path) -> None:
    from bert_classifier import BertClassifier, Reviews
    from qpipe_zoo.task.classification import Classification

    torch.manual_seed(0)
    model = train(BertClassifier(), Reviews(512), Classification(), 12, 3e-3)
    save_file(model.state_dict(), tmp_path / "bert.safetensors")
    report = command(
        tmp_path,
        "model._target_=bert_classifier.BertClassifier",
        "model.weights=bert.safetensors",
        "data._target_=bert_classifier.Reviews",
        "data.calibration.num_samples=128",
    )
    metrics = report["metrics"]
    assert metrics["fp32"]["top1_percent"] > 75
    assert {"simulated", "onnx"} <= set(metrics)
    assert abs(metrics["onnx"]["top1_percent"] - metrics["fp32"]["top1_percent"]) < 6
    assert metrics["simulated"]["size_bytes"] < 0.4 * metrics["fp32"]["size_bytes"]
    assert any("query" in weight["name"] for weight in report["weights"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_detector(tmp_path: Path) -> None:
    from detector import Detection, Detector, Squares

    torch.manual_seed(0)
    model = train(Detector(), Squares(512), Detection(), 12, 3e-3)
    save_file(model.state_dict(), tmp_path / "detector.safetensors")
    report = command(
        tmp_path,
        "model._target_=detector.Detector",
        "model.weights=detector.safetensors",
        "data._target_=detector.Squares",
        "data.calibration.num_samples=128",
        "task._target_=detector.Detection",
    )
    metrics = report["metrics"]
    assert metrics["fp32"]["iou_percent"] > 40
    assert {"simulated", "onnx"} <= set(metrics)
    assert abs(metrics["onnx"]["iou_percent"] - metrics["fp32"]["iou_percent"]) < 5
    assert metrics["onnx"]["sqnr_db"] > 15

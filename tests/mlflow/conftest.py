from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import yaml

CONFIG = {"weight": {"num_bits": 8, "calibrator": None}, "tracker": {"name": "mlflow"}, "layers": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run with an ONNX file that doubles its input."""
    (tmp_path / "onnx").mkdir()
    io = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", io[:1], io[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "onnx/model.onnx")
    report = {
        "metrics": {"fp32": {"top1_percent": 99.4}, "onnx": {"top1_percent": 99.2, "latency_ms": 0.1}},
        "artifacts": [{"path": "onnx/model.onnx"}],
        "edges": [{"name": "input", "num_bits": 8}],
        "environment": {"finished": "2026-01-02T03:04:05+0000"},
        "folder": str(tmp_path),  # differs from test to test, as runs do
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path

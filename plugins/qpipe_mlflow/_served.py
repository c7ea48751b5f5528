"""Code stored with a model: run an ONNX file on what a request holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class OnnxModel(PythonModel):
    """Run the artifact 'onnx' in ONNX Runtime."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the file, if it is the one that was stored, as precisely as it says."""
        content = Path(context.artifacts["onnx"]).read_bytes()
        stored = (context.model_config or {}).get("sha256")
        if hashlib.sha256(content).hexdigest() != stored:
            raise ValueError("the ONNX file is not the one this model was stored with; log the model again")
        self.session = _session(content, None)
        described = self.session.get_modelmeta().custom_metadata_map.get("qpipe.call")
        level = json.loads(described).get("accuracy_level") if described else None
        if level is not None:
            self.session = _session(content, int(level))

    # the hint is one that MLflow does not warn about; a dict of arrays comes too
    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,  # bare: MLflow compares it
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return every output by name; model_input is a dict of arrays, or the only input's array."""
        names = [value.name for value in self.session.get_inputs()]
        given = model_input if isinstance(model_input, dict) else {names[0]: model_input}
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"the model takes {', '.join(names)}; the request lacks {missing[0]}")
        results = self.session.run(None, {name: np.asarray(given[name]) for name in names})
        outputs = (value.name for value in self.session.get_outputs())
        return dict(zip(outputs, results, strict=True))


def _session(content: bytes, accuracy_level: int | None) -> Any:  # noqa: ANN401  # InferenceSession
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


mlflow.models.set_model(OnnxModel())

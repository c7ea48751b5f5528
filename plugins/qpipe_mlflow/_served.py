"""Code stored with a model: run an ONNX file on what a request holds."""

from __future__ import annotations

from typing import Any

import mlflow.models
import numpy as np
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class OnnxModel(PythonModel):
    """Run the artifact 'onnx' in ONNX Runtime."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the file."""
        import onnxruntime

        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], providers=["CPUExecutionProvider"]
        )

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
        results = self.session.run(None, {name: np.asarray(given[name]) for name in names})
        outputs = (value.name for value in self.session.get_outputs())
        return dict(zip(outputs, results, strict=True))


mlflow.models.set_model(OnnxModel())

"""An ONNX file as a model that `mlflow models serve` answers for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


@contextmanager
def save_model(path: Path) -> Iterator[Path]:
    """Yield a folder with the file, the code that runs it, its signature and an example of zeros."""
    import mlflow.pyfunc
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # only asked its names
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(prefix="qpipe-") as folder:
        model = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            model,
            python_model=str(Path(__file__).with_name("_served.py")),
            artifacts={"onnx": str(path)},
            signature=_signature(session),
            input_example=_example(session),
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "onnxruntime", "numpy")],
        )
        yield model


def _signature(session: Any) -> ModelSignature:  # noqa: ANN401  # InferenceSession
    from mlflow.models import ModelSignature
    from mlflow.types import Schema

    outputs = [_spec(value) for value in session.get_outputs()]
    return ModelSignature(Schema([_spec(value) for value in session.get_inputs()]), Schema(outputs))


def _spec(value: Any) -> Any:  # noqa: ANN401  # NodeArg -> TensorSpec
    import numpy as np
    from mlflow.types import TensorSpec

    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(np.dtype(_DTYPES[value.type]), shape, value.name)


def _example(session: Any) -> dict[str, Any]:  # noqa: ANN401
    import numpy as np

    def zeros(value: Any) -> Any:  # noqa: ANN401
        return np.zeros([size if isinstance(size, int) else 1 for size in value.shape], _DTYPES[value.type])

    return {value.name: zeros(value) for value in session.get_inputs()}

"""An ONNX file as a model that `mlflow models serve` answers for."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

CANDIDATE = "candidate"  # alias of the version whose gate held last
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


def log_model(client: MlflowClient, run_id: str, path: Path) -> str:
    """Log an ONNX file as a model of a run, once; return the model's id."""
    experiment_id = client.get_run(run_id).info.experiment_id
    ours = f"source_run_id = '{run_id}'"
    begun = {str(model.status): model for model in client.search_logged_models([experiment_id], ours)}
    if "READY" in begun:
        return str(begun["READY"].model_id)
    model = begun.get("PENDING") or client.create_logged_model(
        experiment_id, "quantized", run_id, model_type="onnx"
    )
    with save_model(path, run_id, model.model_id) as folder:
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def register(client: MlflowClient, run_id: str, model_id: str, name: str, accepted: bool) -> None:
    """Register a logged model, once; an accepted one becomes the candidate."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = versions[0] if versions else None
    if version is None:
        source = _source(client, model_id)
        version = client.create_model_version(name, source, run_id, model_id=model_id)
    if accepted:
        client.set_registered_model_alias(name, CANDIDATE, version.version)


def _source(client: MlflowClient, model_id: str) -> str:
    """Return where a version's files are, as a server takes it, or a store in this process.

    The latter would look 'models:/' up in whatever store is the process's own.
    """
    if client.tracking_uri.startswith("http"):
        return f"models:/{model_id}"
    return str(client.get_logged_model(model_id).artifact_location)


@contextmanager
def save_model(path: Path, run_id: str | None = None, model_id: str | None = None) -> Iterator[Path]:
    """Yield a folder with the file, the code that runs it, its signature and an example of zeros."""
    import mlflow.pyfunc
    import onnxruntime
    from mlflow.models import Model

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # only asked its names
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(prefix="qpipe-") as folder:
        model = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            model,
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            python_model=str(Path(__file__).with_name("_served.py")),
            artifacts={"onnx": str(path)},
            model_config={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
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

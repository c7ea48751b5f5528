"""A file from somewhere else: read as data, refused in one sentence where it is not what we write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe import DataError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto


def read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return a file's bytes and how it is called; the bytes name no other file.

    Raises:
        DataError: it is damaged, is not from this exporter, or wants to read other files.
    """
    from onnx import ModelProto

    from qpipe_onnx._runtime import CALL

    content, model = path.read_bytes(), ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's DecodeError, which comes without types
        raise DataError(f"{path} is no complete ONNX file; export the model again") from None
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
            where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            raise DataError(
                f"{path} reads '{tensor.name}' from another file ('{where}'), which this exporter never "
                "writes; do not trust it"
            )
    described = {entry.key: entry.value for entry in model.metadata_props}.get(CALL)
    if described is None:
        raise DataError(f"{path} does not say how it is called; it was not written by this exporter")
    return content, _call(path, described)


def _call(path: Path, described: str) -> dict[str, Any]:
    try:
        call = json.loads(described)
        known = {"keywords": [str(key) for key in call["keywords"]], "output": call["output"]}
        return {**known, "accuracy_level": int(call.get("accuracy_level", 1))}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} does not say sensibly how it is called; export the model again") from None


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every stored tensor, of the graph, of what is nested in it, and of functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)
    for training in model.training_info:
        yield from (*_of_graph(training.initialization), *_of_graph(training.algorithm))


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[TensorProto]:  # noqa: ANN401  # a repeated field
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            if graph.ByteSize():
                yield from _of_graph(graph)

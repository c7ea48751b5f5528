"""From a converted module to an ONNX graph that takes any batch size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qpipe import RecipeError
from qpipe.calls import Call, dynamic_batch, two_samples

if TYPE_CHECKING:
    import onnx_ir

_MAX_BYTES = 2**31 - 2**20  # of one protocol buffer, some kept for the graph
_LOGGER = (
    "torch.onnx._internal.exporter._registration"  # names every operation of a package that is not there
)


def trace(model: nn.Module, call: Call, opset: int) -> onnx_ir.Model:
    """Translate model, called so, to ONNX.

    The batch dimension varies, and that of token sequences where the model lets it.

    Raises:
        RecipeError: the model's forward fixes the batch size, or an operation has no ONNX form.
    """
    from qpipe_onnx import _dynamic, _tables

    call = two_samples(call)
    with torch.no_grad(), _quiet(), _dynamic.placed(model) as translations, _tables.placed(model):
        try:
            exported = torch.export.export(model, *call, dynamic_shapes=dynamic_batch(call), strict=False)
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"the model has no ONNX form for every batch size: {type(error).__name__}: {reason}; "
                "leave out exporter onnx, or take sizes from x.shape in forward"
            ) from error
    if program is None:
        raise RecipeError("torch.onnx.export returned no program; leave out exporter onnx")
    return program.model


def write(graph: onnx_ir.Model, path: Path, metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """Write the graph as one file, in the form ONNX Runtime fuses; return what writes its float twin.

    Raises:
        RecipeError: it does not fit one file.
    """
    import onnx_ir

    from qpipe_onnx import _graph, _tables, _weights

    _graph.tidy(graph)
    _tables.expand(graph)
    before = onnx_ir.to_proto(graph)
    _graph.fuse(graph)
    _weights.store(graph)
    _graph.name_dimensions(graph)
    graph.metadata_props.update(metadata)
    num_bytes = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value
    )
    if num_bytes > _MAX_BYTES:
        raise RecipeError(
            f"{num_bytes / 1e9:.1f} GB of codes exceed the 2 GB one ONNX file holds; leave out exporter onnx"
        )
    onnx_ir.save(graph, path)

    def write_twin(path: Path) -> None:
        twin = onnx_ir.from_proto(before)
        _graph.strip(twin)
        onnx_ir.save(twin, path)

    return write_twin


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

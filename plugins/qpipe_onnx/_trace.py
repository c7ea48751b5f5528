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
from qpipe.errors import cause

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
                optimize=False,
                custom_translation_table=translations,
            )
        except Exception as error:
            raise RecipeError(
                f"the model has no ONNX form for every batch size: {cause(error)}; leave out exporter onnx, "
                "or take sizes from x.shape in forward"
            ) from error
    if program is None:
        raise RecipeError("torch.onnx.export returned no program; leave out exporter onnx")
    _optimize(program.model)
    return program.model


def _optimize(model: onnx_ir.Model) -> None:
    """Fold and share what a graph repeats.

    torch's own choice of passes tries a rule of two outputs on every pair of nodes: a decoder of 30 blocks
    took longer for that than for all the rest. ONNX Runtime knows the rules left out here.
    """
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True)
    passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def write(graph: onnx_ir.Model, path: Path, metadata: Mapping[str, str]) -> Callable[[Path], bool]:
    """Write the graph as one file, in the form ONNX Runtime fuses; return what writes its float twin.

    That says whether it wrote one: a twin that does not fit one file is left out.

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
    if (num_bytes := _num_bytes(graph)) > _MAX_BYTES:
        raise RecipeError(
            f"{num_bytes / 1e9:.1f} GB of codes exceed the 2 GB one ONNX file holds; leave out exporter onnx"
        )
    onnx_ir.save(graph, path)

    def write_twin(path: Path) -> bool:
        twin = onnx_ir.from_proto(before)
        _graph.strip(twin)
        if fits := _num_bytes(twin) <= _MAX_BYTES:
            onnx_ir.save(twin, path)
        return fits

    return write_twin


def _num_bytes(graph: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)


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

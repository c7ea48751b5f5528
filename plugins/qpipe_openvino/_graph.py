"""From a converted module to an OpenVINO graph."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from qpipe import RecipeError
from qpipe.calls import Call, exported
from qpipe.errors import cause

_Array = np.ndarray[Any, Any]
_OPSET = 21  # of ONNX, between torch's graph and OpenVINO's
_LOGGER = "torch.onnx._internal.exporter._registration"  # names operations of packages that are not there
_INT4 = (-8, 7)


def translate(model: nn.Module, call: Call) -> Any:  # noqa: ANN401  # openvino.Model
    """Return model, called so, as an OpenVINO graph for any batch size.

    OpenVINO's own reader of torch's graphs does not take its quantize and dequantize operations, its reader
    of ONNX does.

    Raises:
        RecipeError: an operation has no ONNX form or none in OpenVINO.
    """
    import openvino

    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                exported(model, call), (), dynamo=True, opset_version=_OPSET, verbose=False
            )
        if program is None:
            raise RecipeError("torch.onnx.export returned no program; leave out exporter openvino")
        graph = openvino.Core().read_model(io.BytesIO(program.model_proto.SerializeToString()))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"the model has no OpenVINO form: {cause(error)}; leave out exporter openvino"
        ) from error
    _simplify(graph)
    return graph


def _simplify(graph: Any) -> None:  # noqa: ANN401
    """Write weights and bounds the way OpenVINO keeps compressed and joins; validate what comes out."""
    nodes = graph.get_ordered_ops()
    weight_only = not any(node.get_type_name() == "FakeQuantize" for node in nodes)
    for node in nodes:
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8":
            _rewrite_weight(node, weight_only)
        elif node.get_type_name() in ("Maximum", "Minimum"):
            _rewrite_clip(node)
    graph.validate_nodes_and_infer_types()


def _rewrite_weight(node: Any, weight_only: bool) -> None:  # noqa: ANN401
    """Write a symmetric weight as codes * scale, the form OpenVINO keeps compressed; int4 where codes fit.

    Blocks of a matrix, [outputs x blocks, inputs of a block], become [outputs, blocks, inputs of a block].
    """
    from openvino import opset13

    codes, end = node.get_data(), _only_user(node)
    if codes.ndim < 2 or end is None or end.get_type_name() != "Convert":
        return
    end = _only_user(end)
    if end is not None and end.get_type_name() == "Subtract":
        zero_point = _constant(end.input_value(1))
        if zero_point is None or zero_point.any():
            return
        end = _only_user(end)
    scale = _constant(end.input_value(1)) if end is not None and end.get_type_name() == "Multiply" else None
    if scale is None:
        return
    sizes = None
    after = _only_user(end)
    if after is not None and after.get_type_name() == "Reshape":
        end, sizes = after, [*after.output(0).get_shape()]
    if sizes is not None and len(codes) % sizes[0] == 0 and codes.ndim == 2:
        codes, scale = codes.reshape(sizes[0], -1, codes.shape[1]), scale.reshape(sizes[0], -1, 1)
    fits = weight_only and codes.min() >= _INT4[0] and codes.max() <= _INT4[1]
    constant = _int4(codes) if fits else opset13.constant(codes)
    constant.set_friendly_name(node.get_friendly_name())
    result = opset13.multiply(opset13.convert(constant, "f32"), opset13.constant(scale))
    if sizes is not None:
        result = opset13.reshape(result, opset13.constant(np.array(sizes)), False)
    _replace(end, result)


def _rewrite_clip(node: Any) -> None:  # noqa: ANN401
    """Write a bound of each channel, at least 0, with Relu: OpenVINO joins that to the convolution before.

    max(x, 0) is relu(x), and min(x, c) is c - relu(c - x).
    """
    from openvino import opset13

    x, bound = node.input_value(0), _constant(node.input_value(1))
    if bound is None or bound.size == 1 or bound.dtype != np.float32 or not np.isfinite(bound).all():
        return
    if node.get_type_name() == "Maximum" and not bound.any():
        _replace(node, opset13.relu(x))
    elif node.get_type_name() == "Minimum" and (bound >= 0).all():
        over = opset13.relu(opset13.add(opset13.multiply(x, np.float32(-1)), bound))
        _replace(node, opset13.add(opset13.multiply(over, np.float32(-1)), bound))


def _constant(value: Any) -> _Array | None:  # noqa: ANN401
    """Return what a value is, where it is a constant that is at most converted and reshaped."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.get_data())
    if kind not in ("Convert", "Reshape"):
        return None
    inner = _constant(node.input_value(0))
    if inner is None or kind == "Convert":
        return inner
    shape = _constant(node.input_value(1))
    return None if shape is None else inner.reshape(shape)


def _only_user(node: Any) -> Any:  # noqa: ANN401
    users = [target.get_node() for target in node.output(0).get_target_inputs()]
    return users[0] if len(users) == 1 else None


def _replace(old: Any, new: Any) -> None:  # noqa: ANN401
    for target in old.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))


def _int4(codes: _Array) -> Any:  # noqa: ANN401
    import openvino

    nibbles = np.resize(codes.reshape(-1).astype(np.uint8) & 0xF, codes.size + codes.size % 2)
    tensor = openvino.Tensor(openvino.Type.i4, openvino.Shape(codes.shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = nibbles[0::2] | (nibbles[1::2] << 4)
    return openvino.op.Constant(tensor)


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

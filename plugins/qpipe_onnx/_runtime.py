"""A file in ONNX Runtime: called like the model, timed, and what became of its nodes."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qpipe import DataError, ProofError
from qpipe.calls import described, filled, given, needed, rebuilt

CALL = "qpipe.call"
_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
ROUNDED = 4  # what ONNX Runtime does unasked: activations rounded to int8, a block at a time
DERIVED = re.compile(r"_nchwc|_token_\d+|/")  # what ONNX Runtime puts behind the name of what it rewrites
_ON_CODES = re.compile(r"Q(?!uantize)|(?:Conv|MatMul)Integer|DynamicQuantize")  # products of integers
FLOAT = 1  # of accuracy_level: products of weights alone in float32, as the simulation has them


class OnnxRuntimeModule(nn.Module):
    """Run an ONNX file on the CPU, called like the model it was made from.

    Args:
        keywords: of the call, in the order of the file's inputs, behind the positional arguments.
        output: what the model returns, each tensor replaced by its index.
        threads: of one inference.
        accuracy_level: of session().
    """

    def __init__(
        self,
        file: Path | bytes,
        keywords: Sequence[str],
        output: Any,  # noqa: ANN401
        threads: int = 1,
        accuracy_level: int = FLOAT,
    ) -> None:
        super().__init__()
        self.session = session(file, threads, accuracy_level=accuracy_level)
        self.keywords = tuple(keywords)
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.output = output

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file that says itself how it is called; records become dictionaries.

        Raises:
            DataError: it is not a file of this exporter, or ONNX Runtime does not take it.
        """
        from qpipe_onnx._trust import read

        content, call = read(path)
        try:
            module = cls(
                content, call["keywords"], rebuilt(call["output"]), accuracy_level=call["accuracy_level"]
            )
        except Exception as error:  # ONNX Runtime's own classes, which derive from no common one
            raise DataError(
                f"ONNX Runtime does not take {path}: {_sentence(error)}; export it again"
            ) from None
        if needed(module.output) > len(module.session.get_outputs()):
            raise DataError(f"{path} returns fewer tensors than it says; export the model again")
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # whatever the model returns
        """Return what the model returns, computed by ONNX Runtime."""
        inputs = given((args, kwargs), self.keywords, self.shapes)
        feed = {name: x.detach().cpu().numpy() for name, x in zip(self.shapes, inputs, strict=True)}
        device = inputs[0].device
        results = [torch.from_numpy(array).to(device) for array in self.session.run(None, feed)]
        return filled(self.output, results)


def describe_call(keywords: Sequence[str], output: Any, accuracy_level: int) -> dict[str, str]:  # noqa: ANN401
    """Return metadata of the file: how it is called and what it returns, as JSON."""
    called = {"keywords": [*keywords], "output": described(output), "accuracy_level": accuracy_level}
    return {CALL: json.dumps(called)}


def _sentence(error: Exception) -> str:
    """Return the first line of an error without what ONNX Runtime puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rpartition(" : ")[2][:200]


def session(
    file: Path | bytes,
    threads: int = 1,
    optimized: Path | None = None,
    accuracy_level: int = FLOAT,
    profile: Path | None = None,
) -> Any:  # noqa: ANN401  # InferenceSession
    """Open a file, or its bytes, on the CPU.

    Args:
        optimized: where to write the graph as it is executed.
        accuracy_level: of products with weights alone (MatMulNBits): 1 computes in float32; 4, what ONNX
            Runtime does unasked, rounds each block of an activation to int8 first.
        profile: what the file begins with that says how long each operation took.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(_ACCURACY_LEVEL, str(accuracy_level))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def executed_nodes(path: Path) -> dict[str, int]:
    """Return the operations ONNX Runtime executes after its own fusions, and how many of each.

    Raises:
        ProofError: weights that are stored in floating point are rounded.
    """
    import onnx
    import onnx_ir as ir

    from qpipe_onnx._graph import float_weight

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        executed = onnx.load(optimized, load_external_data=False).graph.node
    weights = {
        node.name: weight for node in ir.load(path).graph if (weight := float_weight(node)) is not None
    }
    dequantized = {node.output[0] for node in executed if node.op_type == "DequantizeLinear"}
    for node in executed:
        weight = weights.get(DERIVED.split(node.name)[0])
        if weight is not None and (_ON_CODES.match(node.op_type) or node.input[1] in dequantized):
            raise ProofError(
                f"ONNX Runtime computes '{str(weight.name).removesuffix('.weight')}' with weights it rounds "
                f"itself ({node.op_type}), though they are to be in floating point; quantize them "
                "too, or leave its output in floating point (layers=[…])"
            )
    return dict(Counter(node.op_type for node in executed).most_common())

"""A file in ONNX Runtime: called like the model, timed, and what became of its nodes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe_onnx._call import Call, tensors


class OnnxRuntimeModule(nn.Module):
    """Run an ONNX file on the CPU, called like the model it was made from.

    Args:
        call, output: an example of both, for their structure.
        threads: of one inference.
    """

    def __init__(self, path: Path, call: Call, output: Any, threads: int = 1) -> None:  # noqa: ANN401
        super().__init__()
        self.session = session(path, threads)
        self.keywords = tuple(call[1])
        self.names = [value.name for value in self.session.get_inputs()]
        self.output, self.spec = pytree.tree_flatten(output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # whatever the model returns
        """Return what the model returns, computed by ONNX Runtime."""
        inputs = tensors((args, {key: kwargs[key] for key in self.keywords}))
        feed = {name: x.detach().cpu().numpy() for name, x in zip(self.names, inputs, strict=True)}
        results = iter(self.session.run(None, feed))
        device = inputs[0].device
        leaves = [
            torch.from_numpy(next(results)).to(device) if isinstance(leaf, Tensor) else leaf
            for leaf in self.output
        ]
        return pytree.tree_unflatten(leaves, self.spec)


def session(file: Path | bytes, threads: int = 1, optimized: Path | None = None) -> Any:  # noqa: ANN401  # InferenceSession
    """Open a file, or its bytes, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def executed_nodes(path: Path) -> dict[str, int]:
    """Return the operations ONNX Runtime executes after its own fusions, and how many of each."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def latencies_ms(modules: Sequence[nn.Module], call: Call, seconds: float = 0.4) -> list[float]:
    """Return the median time of one call of each module, taken in turns, milliseconds."""
    times: list[list[float]] = [[] for _ in modules]
    stop = time.perf_counter() + seconds
    while len(times[-1]) < 3 or time.perf_counter() < stop:
        for module, taken in zip(modules, times, strict=True):
            start = time.perf_counter()
            module(*call[0], **call[1])
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]

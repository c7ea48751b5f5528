"""A model in OpenVINO: called like the torch model, and what became of its operations."""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qpipe import DataError
from qpipe.artifact import sha256
from qpipe.calls import Index, described, filled, given, needed, rebuilt

GRAPH, WEIGHTS, MANIFEST = "model.xml", "model.bin", "openvino.json"
_FORMAT = "qpipe-openvino"


class OpenVinoModule(nn.Module):
    """Run an OpenVINO graph on the CPU.

    Activations stay in floating point where they have no codes: OpenVINO's default computes in bfloat16 on
    processors that have it, and rounds inputs of int4 products to int8 as it runs; both are switched off.

    Args:
        keywords: of the call, in the order of the graph's inputs, behind the positional arguments.
        output: what the model returns, each tensor replaced by its index.
        default_precision: leave the precision to OpenVINO.
    """

    def __init__(
        self,
        graph: Any,  # noqa: ANN401  # openvino.Model
        keywords: Sequence[str] = (),
        output: Any = None,  # noqa: ANN401
        threads: int = 1,
        default_precision: bool = False,
    ) -> None:
        super().__init__()
        self.keywords = tuple(keywords)
        self.output = Index(0) if output is None else output
        self.compiled = compiled(graph, threads, default_precision)
        self.shapes = {name: shape for name, shape in map(_described, self.compiled.inputs)}

    @classmethod
    def open(cls, manifest: Path) -> Self:
        """Open what the manifest describes, in its folder.

        Raises:
            DataError: a file is missing, not the one the manifest was written for, or no OpenVINO model.
        """
        import openvino

        try:
            about = json.loads(manifest.read_text())
            known = about["format"] == _FORMAT
            digests = {name: about["sha256"][name] for name in (GRAPH, WEIGHTS)}
            keywords, output = about["keywords"], rebuilt(about["output"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{manifest} describes no OpenVINO model of qpipe ({error})") from None
        for name, digest in digests.items():
            file = manifest.parent / name
            if not known or not file.is_file() or sha256(file) != digest:
                raise DataError(f"{file} is not the file {manifest.name} was written for; export again")
        file = manifest.parent / GRAPH
        if not file.read_bytes().startswith(b"<?xml"):  # OpenVINO reads formats that name other files
            raise DataError(f"{file} is no OpenVINO model; export the model again")
        try:
            module = cls(openvino.Core().read_model(file, manifest.parent / WEIGHTS), keywords, output)
        except Exception as error:  # OpenVINO's own
            reason = str(error).strip().splitlines()[-1:]
            raise DataError(
                f"OpenVINO does not take {file}: {''.join(reason)[:200]}; export it again"
            ) from None
        if needed(output) > len(module.compiled.outputs):
            raise DataError(f"{manifest} returns more tensors than {GRAPH} has; export the model again")
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # whatever the model returns
        """Return what the model returns, computed by OpenVINO."""
        inputs = given((args, kwargs), self.keywords, self.shapes)
        found = self.compiled([x.detach().cpu().numpy() for x in inputs])
        results = [torch.from_numpy(found[i].copy()).to(inputs[0].device) for i in range(len(found))]
        return filled(self.output, results)

    def executed(self) -> dict[str, int]:
        """Return the operations OpenVINO executes and the type they compute in, and how many of each."""
        ops = (op.get_rt_info() for op in self.compiled.get_runtime_model().get_ordered_ops())
        names = (f"{_text(info['layerType'])} {_text(info['runtimePrecision'])}" for info in ops)
        ignored = ("Const ", "Input ", "Output ")
        return dict(Counter(name for name in names if not name.startswith(ignored)).most_common())


def compiled(graph: Any, threads: int = 1, default_precision: bool = False) -> Any:  # noqa: ANN401
    """Compile a graph for the CPU."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": str(threads)}
    if not default_precision:
        options |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    with _signal_stack_kept():
        return openvino.Core().compile_model(graph, "CPU", options)


class _SignalStack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Put the thread's alternate signal stack back: OpenVINO leaves one too small for a Python handler.

    Where the processor has AMX, Ctrl-C after compile_model would end in a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def _described(value: Any) -> tuple[str, list[int | str]]:  # noqa: ANN401  # an input
    shape = ["?" if size.is_dynamic else size.get_length() for size in value.get_partial_shape()]
    return value.get_any_name(), shape


def write(graph: Any, folder: Path, keywords: Sequence[str], output: Any) -> Path:  # noqa: ANN401
    """Write graph, weights and, last, the manifest; return the manifest's path."""
    import openvino

    openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)
    about = {
        "format": _FORMAT,
        "keywords": [*keywords],
        "output": described(output),
        "sha256": {name: sha256(folder / name) for name in (GRAPH, WEIGHTS)},
    }
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
    return folder / MANIFEST


def _text(value: Any) -> str:  # noqa: ANN401  # OpenVINO wraps the values of its notes in some versions
    return str(getattr(value, "value", value))

"""Write a torch.export program, and see what Inductor makes of it."""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpipe import Artifact, DataError, ExportContext, Exporter, ProofError, Recipe, convert, hookimpl
from qpipe.artifact import sha256
from qpipe.calls import Call, exported, moved, some_samples
from qpipe.conversion import reason_not_affine
from qpipe.errors import cause
from qpipe.proof import Agreement, calls, end_to_end, latencies_ms
from qpipe.tables import precision
from qpipe_methods.archive import read

_FILE = "model.pt2"
_KERNELS = re.compile(
    r"\b(qconv\w*_pointwise|qlinear_pointwise|_weight_int8pack_mm|_weight_int4pack_mm\w*)\b"
)


class TorchExporter(Exporter):
    """Export what torch itself runs anywhere: codes as buffers, quantize and dequantize as operations.

    Run as it is, the program computes in floating point between its codes, bit for bit what the converted
    model does. Compiled by Inductor with freezing, convolutions and linear layers become int8 kernels on x86.

    Args:
        samples: evaluation samples compared with the simulation.
        compile: compile it too and record its int8 kernels, agreement and speed; costs minutes of C++
            compilation for deep networks, and needs a compiler.
    """

    name = "torch"

    def __init__(self, samples: int = 64, compile: bool = False) -> None:  # torch's word for it
        self.samples = samples
        self.compile = compile

    def reason_not(self, recipe: Recipe) -> str | None:
        """Name the first thing that has no codes, or that a table does not hold."""
        for role, slot in recipe.every_slot():
            if reason := reason_not_affine(role, slot, tables=True):
                return reason
            if slot.spec.dynamic:
                return f"{role.value}.dynamic=true: the program holds ranges from calibration"
        return None

    def export(self, context: ExportContext) -> Artifact:
        """Write model.pt2, load it, run it and compare.

        Raises:
            ProofError: the loaded program computes another thing than the converted model.
            RecipeError: the model has no graph.
        """
        call = next(calls(context), None)
        if call is None:
            raise DataError("there is no evaluation sample to prove the program on; give the data some")
        path, call = context.folder / _FILE, moved(call, "cpu")
        converted = convert(context.simulation, tables=True).cpu()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            torch.export.save(_bare(exported(converted, call)), path)
            module = _loaded(path)
        with torch.no_grad():
            outputs = [context.task.compared(run(*call[0], **call[1])) for run in (module, converted)]
            if not torch.equal(*outputs):
                raise ProofError(
                    f"the loaded program is up to {(outputs[0] - outputs[1]).abs().max():.3g} away from the "
                    "converted model; leave out exporter torch, and report the model"
                )
            proof = {"bit_equal": True, **precision(converted), **end_to_end(module, context, self.samples)}
            if self.compile:
                proof |= _compiled(module, context, call)
        return Artifact(
            self.name,
            f"torch {torch.__version__}",
            Path(_FILE),
            sha256(path),
            path.stat().st_size,
            proof,
            module,
        )

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return the program as a module."""
        try:
            return _loaded(path)
        except DataError:
            raise
        except Exception as error:  # whatever an edited archive leads torch to
            raise DataError(f"{path} is no program torch can load ({cause(error)}); export again") from error


def _loaded(path: Path) -> nn.Module:
    # registers torch.ops.quantized_decomposed, which the program calls
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    content = read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(content).module()


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take out what a file for others does not need: samples of the data, this machine's paths."""
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return program


def _compiled(module: nn.Module, context: ExportContext, call: Call) -> dict[str, Any]:
    """Compile for the batch of call; return its int8 kernels, agreement and times, or why there are none."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    fast = torch.compile(module)
    try:
        with warnings.catch_warnings(), config.patch(freezing=True):
            warnings.simplefilter("ignore")
            output, sources = run_and_get_code(fast, *call[0], **call[1])
            one = some_samples(call, 1)
            reference = torch.compile(context.reference.cpu())
            times = latencies_ms([torch.compile(module), module, reference], one)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        return {"compiled": f"not compiled: {type(error).__name__}: {''.join(reason)[:200]}"}
    simulated = context.task.compared(module(*call[0], **call[1]))
    agreement = Agreement.between(context.task.compared(output), simulated, context.task.class_dim)
    kernels = Counter(name for source in sources for name in _KERNELS.findall(source))
    names = ("compiled_latency_ms", "latency_ms", "compiled_fp32_latency_ms")
    return {
        "kernels": dict(kernels),
        "compiled_sqnr_db": agreement.sqnr_db,
        "compiled_agreement_percent": agreement.agreement_percent,
        **dict(zip(names, times, strict=True)),
        "threads": torch.get_num_threads(),
    }


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the torch exporter."""
    return [TorchExporter]

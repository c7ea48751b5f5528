"""Write one ONNX file of int8 codes and prove it in ONNX Runtime."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpipe import (
    Artifact,
    DataError,
    ExportContext,
    Exporter,
    Operation,
    Recipe,
    RecipeError,
    Role,
    Samples,
    Slot,
    Target,
    convert,
    hookimpl,
    payload_bytes,
)
from qpipe.calls import Call, indexed, moved, some_samples
from qpipe.conversion import reason_not_affine
from qpipe.proof import calls, end_to_end, latencies
from qpipe.tables import precision
from qpipe_onnx._agreement import step_by_step
from qpipe_onnx._runtime import FLOAT, ROUNDED, OnnxRuntimeModule, describe_call, executed_nodes
from qpipe_onnx._timing import owners, scopes, timed
from qpipe_onnx._trace import trace, write

_FILE = "model.onnx"
_STEP_SAMPLES = 16  # compared edge by edge
_PROBE = torch.empty(8, 4096, device="meta")


class OnnxExporter(Exporter):
    """Export to ONNX with QuantizeLinear and DequantizeLinear, executed by ONNX Runtime.

    Args:
        opset: version of ONNX's operations.
        samples: evaluation samples compared with the simulation.
        compare_fp32: time the float graph of the same architecture beside the file.
        accuracy_level: of products with weights alone: 1 in float32, 4 rounds activations to int8 in blocks.
    """

    name = "onnx"

    def __init__(
        self, opset: int = 21, samples: int = 256, compare_fp32: bool = True, accuracy_level: int = FLOAT
    ) -> None:
        if accuracy_level not in (FLOAT, ROUNDED):
            raise RecipeError(f"exporter.onnx.accuracy_level={accuracy_level} is unknown; use 1 or 4")
        self.opset = opset
        self.samples = samples
        self.compare_fp32 = compare_fp32
        self.accuracy_level = accuracy_level

    def reason_not(self, recipe: Recipe) -> str | None:
        """Name the first thing ONNX Runtime has no integer form for."""
        slots = [*recipe.every_slot()]
        rounded = any(role is Role.ACTIVATION for role, _ in slots)
        reasons = (
            _reason(role, slot, rounded)
            or (_reason_dynamic(slot, recipe.target) if slot.spec.dynamic else None)
            for role, slot in slots
        )
        return next((reason for reason in reasons if reason is not None), None)

    def export(self, context: ExportContext) -> Artifact:
        """Write model.onnx, run it on evaluation samples and compare.

        Raises:
            ProofError: ONNX Runtime disagrees with the simulation.
            RecipeError: the model cannot be translated.
        """
        call = next(calls(context), None)
        if call is None:
            raise DataError("there is no evaluation sample to prove the ONNX file on; give the data some")
        path = context.folder / _FILE
        converted = convert(context.simulation, dynamic=True, tables=True).cpu()
        call = moved(call, "cpu")
        with torch.no_grad():
            output = indexed(converted(*call[0], **call[1]))
            graph = trace(converted, call, self.opset)
            about = describe_call([*call[1]], output, self.accuracy_level)
            twin = write(graph, path, about)
            module = OnnxRuntimeModule(path, [*call[1]], output, accuracy_level=self.accuracy_level)
            nodes = executed_nodes(path)
            proof = step_by_step(converted, path, some_samples(call, _STEP_SAMPLES), context.task)
            proof |= end_to_end(module, context, self.samples)
            proof |= {
                "nodes": nodes,
                "counted_bytes": payload_bytes(context.simulation),
                **precision(converted),
            }
            proof |= self._latency(path, module, twin, call, "MatMulNBits" in nodes)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        engine = f"onnxruntime {version('onnxruntime')}"
        return Artifact(self.name, engine, Path(_FILE), digest, path.stat().st_size, proof, module)

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return a module that runs the file in ONNX Runtime."""
        return OnnxRuntimeModule.open(path)

    def operations(self, model: nn.Module, call: Call, layers: Collection[str]) -> list[Operation]:
        """Return what ONNX Runtime executes for a call, each operation timed."""
        converted, call = convert(model, dynamic=True, tables=True).cpu(), moved(call, "cpu")
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / _FILE
            graph = trace(converted, call, self.opset)
            modules = scopes(graph)
            write(graph, path, {})
            return timed(path, owners(graph, modules, layers), call, self.accuracy_level, Path(folder))

    def _latency(
        self, file: Path, module: OnnxRuntimeModule, twin: Callable[[Path], bool], call: Call, rounds: bool
    ) -> dict[str, Any]:
        """Time the file beside the float graph and beside ONNX Runtime's own choice of precision."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / _FILE
            modules = {"": module}
            if self.compare_fp32 and twin(path):
                modules["fp32_"] = OnnxRuntimeModule(path, module.keywords, module.output)
            if rounds and self.accuracy_level != ROUNDED:
                modules["default_precision_"] = OnnxRuntimeModule(
                    file, module.keywords, module.output, accuracy_level=ROUNDED
                )
            return latencies(modules, call)


def _reason(role: Role, slot: Slot, rounded: bool) -> str | None:
    """Say what no integer product is made of; rounded: activations are codes too."""
    spec, granularity = slot.spec, slot.granularity
    if reason := reason_not_affine(role, slot, tables=True):
        return reason
    if not slot.quantizer.is_affine(spec):
        return _reason_alone(slot) if rounded else None
    if role is Role.ACTIVATION and spec.num_bits != 8:
        return f"ONNX Runtime computes on 8-bit activations, not activation.num_bits={spec.num_bits}"
    if role is Role.WEIGHT and spec.num_bits > 8:
        return f"ONNX Runtime computes on weights of at most 8 bits, not weight.num_bits={spec.num_bits}"
    if not rounded or spec.dynamic:
        return None
    rows = 1 if role is Role.ACTIVATION else _PROBE.shape[0]
    blocks = granularity.to_blocks(_PROBE).shape[0]
    if blocks > rows:
        return (
            f"granularity '{granularity.name}' gives {role.value}s more scales than one a channel, which "
            "ONNX Runtime does not multiply by codes; use granularity=channel, or activation=null (and "
            "exporter.onnx.accuracy_level=4 to round activations in blocks while running)"
        )
    if blocks > 1 and not spec.symmetric and spec.num_bits == 8:  # convert() centres fewer bits
        return "ONNX Runtime wants one zero point for all channels of 8 bits; use weight.symmetric=true"
    return None


def _reason_alone(slot: Slot) -> str:
    """Say why such weights stand alone: ONNX Runtime's WeightBiasQuantization makes int8 of them."""
    return (
        f"between quantized activations ONNX Runtime rounds weights of quantizer '{slot.quantizer.name}' to "
        "even steps of its own; use activation=null to quantize weights alone"
    )


def _reason_dynamic(slot: Slot, target: Target) -> str | None:
    """Say why ONNX Runtime would not take the same ranges while it runs."""
    spec, per_token = slot.spec, slot.granularity.dynamic_only
    if not target.dynamic:
        return (
            f"activation.dynamic=true: target '{target.name}' has stored ranges at every operation; "
            "use target=x86_linear"
        )
    if (spec.symmetric, spec.signed) != (per_token, per_token):
        words = str(per_token).lower()
        return (
            f"ONNX Runtime takes ranges of a {'token' if per_token else 'tensor'} while running "
            f"with activation.symmetric={words} activation.signed={words}"
        )
    samples = Samples(slot.granularity.to_blocks(torch.linspace(-1, 2, 512).sinh().reshape(8, 64)))
    ranged, seen = slot.calibrator.range(samples, slot.quantizer, spec), samples.extremes()
    if not torch.equal(ranged.low, seen.low) or not torch.equal(ranged.high, seen.high):
        name = slot.calibrator.name
        return f"ONNX Runtime takes extremes while running, not what calibrator '{name}' does; use minmax"
    return None


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the ONNX exporter."""
    return [OnnxExporter]

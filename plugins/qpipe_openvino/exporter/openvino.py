"""Write an OpenVINO model of int8 or int4 codes and prove it in OpenVINO."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpipe import Artifact, DataError, ExportContext, Exporter, Recipe, Role, Slot, convert, hookimpl
from qpipe.artifact import sha256
from qpipe.calls import Call, indexed, moved, some_samples
from qpipe.conversion import reason_not_affine
from qpipe.proof import calls, end_to_end, latencies
from qpipe_openvino._agreement import step_by_step
from qpipe_openvino._graph import translate
from qpipe_openvino._runtime import MANIFEST, OpenVinoModule, write

_STEP_SAMPLES = 16  # compared edge by edge
_PROBE = torch.empty(8, 4096, device="meta")


class OpenVinoExporter(Exporter):
    """Export to OpenVINO: int8 where weights and activations have codes, int8 or int4 where weights alone do.

    Args:
        samples: evaluation samples compared with the simulation.
        compare_fp32: time the float model beside the file, in float32 and in OpenVINO's default precision
            (bfloat16 on processors with AMX: a gain over float32 alone would flatter the codes).
    """

    name = "openvino"

    def __init__(self, samples: int = 256, compare_fp32: bool = True) -> None:
        self.samples = samples
        self.compare_fp32 = compare_fp32

    def reason_not(self, recipe: Recipe) -> str | None:
        """Name the first thing OpenVINO has no integer form for."""
        slots = [*recipe.every_slot()]
        static = any(role is Role.ACTIVATION for role, _ in slots)
        reasons = (_reason(role, slot, static) for role, slot in slots)
        return next((reason for reason in reasons if reason is not None), None)

    def export(self, context: ExportContext) -> Artifact:
        """Write model.xml, model.bin and a manifest, run them on evaluation samples and compare.

        Raises:
            ProofError: OpenVINO disagrees with the simulation.
            RecipeError: the model cannot be translated.
        """
        call = next(calls(context), None)
        if call is None:
            raise DataError(
                "there is no evaluation sample to prove the OpenVINO model on; give the data some"
            )
        converted = convert(context.simulation).cpu()
        call = moved(call, "cpu")
        with torch.no_grad():
            output = indexed(converted(*call[0], **call[1]))
            graph = translate(converted, call)
            path = write(graph, context.folder, [*call[1]], output)
            module = OpenVinoModule.open(path)
            proof = step_by_step(converted, graph, some_samples(call, _STEP_SAMPLES), context.task)
            proof |= end_to_end(module, context, self.samples) | {"nodes": module.executed()}
            proof |= self._latency(module, context.reference, call)
        num_bytes = sum(file.stat().st_size for file in context.folder.iterdir())
        engine = f"openvino {version('openvino')}"
        return Artifact(self.name, engine, Path(MANIFEST), sha256(path), num_bytes, proof, module)

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return a module that runs the model in OpenVINO."""
        return OpenVinoModule.open(path)

    def _latency(self, module: OpenVinoModule, reference: nn.Module, call: Call) -> dict[str, Any]:
        modules = {"": module}
        if self.compare_fp32:
            graph = translate(reference.cpu(), call)
            for word, default in (("fp32_", False), ("default_precision_", True)):
                modules[word] = OpenVinoModule(
                    graph, module.keywords, module.output, default_precision=default
                )
        return latencies(modules, call)


def _reason(role: Role, slot: Slot, static: bool) -> str | None:
    spec, granularity = slot.spec, slot.granularity
    if reason := reason_not_affine(role, slot):
        return reason
    if spec.dynamic:
        return f"{role.value}.dynamic=true: ranges taken while running are not what OpenVINO would take"
    if role is Role.ACTIVATION and spec.num_bits != 8:
        return f"OpenVINO computes on 8-bit activations, not activation.num_bits={spec.num_bits}"
    if spec.num_bits > 8:
        return f"OpenVINO keeps weights of at most 8 bits, not weight.num_bits={spec.num_bits}"
    blocks = granularity.to_blocks(_PROBE).shape[0]
    if static and blocks > (1 if role is Role.ACTIVATION else _PROBE.shape[0]):
        return f"granularity '{granularity.name}' gives {role.value}s more scales than one a channel"
    return None


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the OpenVINO exporter."""
    return [OpenVinoExporter]

"""Write codes packed to their bits, and prove that they give back the simulation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from qpipe import (
    Artifact,
    DataError,
    ExportContext,
    Exporter,
    ProofError,
    hookimpl,
    load,
    shared_copy,
    write_codes,
)

_MANIFEST = "manifest.json"


class SafetensorsExporter(Exporter):
    """Export any recipe: packed codes, their parameters and the float rest; `qpipe.load` reads them."""

    name = "safetensors"

    def export(self, context: ExportContext) -> Artifact:
        """Write model.safetensors and manifest.json, load them into the float model and compare.

        Raises:
            ProofError: one output differs in one bit.
        """
        batch = next(iter(context.batches), None)
        if batch is None:
            raise DataError("there is no evaluation sample to prove the stored codes on; give the data some")
        args, kwargs = context.task.inputs(batch)
        about = f"{type(context.reference).__module__}.{type(context.reference).__qualname__}"
        write_codes(context.simulation, context.recipe, (args, kwargs), context.folder, about)
        restored = load(context.folder, model=shared_copy(context.reference))
        with torch.no_grad():
            outputs = [
                context.task.compared(model(*args, **kwargs)) for model in (restored, context.simulation)
            ]
        if not torch.equal(*outputs):
            difference = (outputs[0] - outputs[1]).abs().max().item()
            raise ProofError(
                f"the model loaded from the stored codes is up to {difference:.3g} away from the simulation; "
                "leave out exporter safetensors, and report the quantizer"
            )
        files = [path for path in context.folder.iterdir() if path.is_file()]
        digest = hashlib.sha256((context.folder / _MANIFEST).read_bytes()).hexdigest()
        num_bytes = sum(path.stat().st_size for path in files)
        return Artifact(self.name, "simulated", Path(), digest, num_bytes, {"bit_equal": True})


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the safetensors exporter."""
    return [SafetensorsExporter]

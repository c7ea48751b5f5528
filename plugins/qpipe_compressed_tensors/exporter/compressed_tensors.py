"""Write the folder of a language model that transformers and vLLM read, and prove it by reading it."""

from __future__ import annotations

import copy
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
    ProofError,
    Recipe,
    RecipeError,
    Role,
    hookimpl,
)
from qpipe.artifact import sha256
from qpipe.conversion import reason_not_affine
from qpipe.proof import calls, end_to_end
from qpipe_compressed_tensors._folder import CONFIG, read, write

_BITS = (4, 8)
_TOLERANCE = 0.05  # steps of 1/255 of the output's range: float sums in another order


class CompressedTensorsExporter(Exporter):
    """Export weights in the format compressed-tensors, one scale a channel or a group of inputs.

    Linear layers are packed to 4 or 8 bits; other quantized weights (embeddings, and what is tied to them)
    are stored as the reals their codes mean, which the proof lists. transformers unpacks as it first runs.

    Args:
        samples: evaluation samples compared with the simulation.
    """

    name = "compressed_tensors"

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples

    def reason_not(self, recipe: Recipe) -> str | None:
        """Name the first thing the format does not hold."""
        if recipe.weight is None:
            return "there are no quantized weights"
        for role, slot in recipe.every_slot():
            if role is Role.ACTIVATION:
                return "the packed format holds weights alone; use activation=null and target=generic"
            if reason := reason_not_affine(role, slot):
                return reason
            if slot.spec.num_bits not in _BITS:
                return f"vLLM reads packed weights of 4 or 8 bits, not weight.num_bits={slot.spec.num_bits}"
            if not slot.spec.symmetric:
                return "transformers does not read packed zero points; use weight.symmetric=true"
        return None

    def export(self, context: ExportContext) -> Artifact:
        """Write config.json and model.safetensors, read them with transformers and compare.

        Raises:
            ProofError: the model transformers reads computes another thing than the simulation.
            RecipeError: the model is none of transformers, or a weight's blocks have no form.
        """
        if next(calls(context), None) is None:
            raise DataError("there is no evaluation sample to prove the folder on; give the data some")
        path, config = _language_model(context.reference)
        simulation = context.simulation.get_submodule(path)
        about, floats = write(simulation, config, context.folder)
        module: Any = read(context.folder)
        if path:
            whole = copy.deepcopy(context.reference)
            whole.set_submodule(path, module)
            module = whole
        with torch.no_grad():
            proof = end_to_end(module, context, self.samples)
        if proof["max_difference_steps"] > _TOLERANCE:
            raise ProofError(
                f"the model transformers reads is {proof['max_difference_steps']:.2f} steps away from the "
                f"simulation, {_TOLERANCE} is allowed; leave out exporter compressed_tensors, and report it"
            )
        proof |= {
            "stored_as_reals": floats,
            "schemes": [g["weights"] for g in about["config_groups"].values()],
        }
        num_bytes = sum(file.stat().st_size for file in context.folder.iterdir())
        engine = f"transformers {version('transformers')}"
        digest = sha256(context.folder / CONFIG)
        return Artifact(self.name, engine, Path(CONFIG), digest, num_bytes, proof, module)

    @classmethod
    def load(cls, path: Path) -> nn.Module | None:
        """Return the language model, read by transformers."""
        return read(path.parent)


def _language_model(model: nn.Module) -> tuple[str, Any]:
    """Return where in the model the one of transformers is, and its configuration."""
    import transformers

    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            config = copy.deepcopy(module.config)
            config.architectures = [type(module).__name__]
            return path, config
    raise RecipeError(
        f"{type(model).__name__} holds no model of transformers; leave out exporter compressed_tensors"
    )


@hookimpl
def qpipe_register_exporter() -> list[type[Exporter]]:
    """Offer the compressed-tensors exporter."""
    return [CompressedTensorsExporter]

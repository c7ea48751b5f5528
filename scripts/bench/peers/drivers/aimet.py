from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

# with its dependencies it brings 6 GB of CUDA beside a CPU torch; these are what the import asks for
REQUIRES = [
    "aimet-torch --no-deps",
    "numpy",
    "onnx",
    "onnxscript",
    "safetensors",
    "scipy",
    "pandas",
    "tqdm",
    "psutil",
    "bokeh",
    "matplotlib",
    "jsonschema",
    "scikit-learn",
    "transformers",
]


def load() -> str:
    from importlib.metadata import version

    import aimet_torch  # noqa: F401

    return version("aimet-torch")


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    model = prepare_model(model)
    fold_all_batch_norms(model, input_shapes=(1, 3, 224, 224), dummy_input=crops[:1])
    simulation = QuantizationSimModel(
        model, crops[:1], quant_scheme=QuantScheme.min_max, default_param_bw=8, default_output_bw=8
    )

    def forward(sim: torch.nn.Module, _: object = None) -> None:
        with torch.no_grad():
            for batch in crops.split(16):
                sim(batch)

    simulation.compute_encodings(forward, None)
    modules = [m for m in simulation.model.modules() if hasattr(m, "output_quantizers")]
    edges = sum(q is not None for m in modules for q in (*m.input_quantizers, *m.output_quantizers))
    return Quantized(eager(simulation.model), edges)


VARIANTS = {"min-max": quantized}

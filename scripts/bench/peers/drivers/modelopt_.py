from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES = [
    "nvidia-modelopt",
    "onnx",
    "setuptools",
    "pulp",
    "pydantic",
    "regex",
    "safetensors",
    "tqdm",
    "scipy",
    "requests",
    "huggingface_hub",
]


def load() -> str:
    import modelopt
    import modelopt.torch.quantization

    return str(modelopt.__version__)


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    import modelopt.torch.quantization as mtq

    def forward(net: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in crops.split(16):
                net(batch)

    result = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward)
    names = ("input_quantizer", "output_quantizer")
    edges = sum(n.endswith(names) and getattr(m, "is_enabled", False) for n, m in result.named_modules())
    return Quantized(eager(result), edges)


VARIANTS = {"INT8_DEFAULT_CFG": quantized}

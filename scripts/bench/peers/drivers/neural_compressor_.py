from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES = ["neural-compressor-pt", "setuptools"]


def load() -> str:
    from importlib.metadata import version

    import neural_compressor.torch.quantization  # noqa: F401

    return version("neural-compressor-pt")


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    program = export(model, example_inputs=(crops[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    prepared = prepare(program, get_default_static_config(), example_inputs=(crops[:2],))
    with torch.no_grad():
        for batch in crops.split(16):
            prepared(batch)
    result = convert(prepared)
    names = [str(n.target) for n in result.graph.nodes]
    edges = sum("quantize_per_tensor" in n and "dequantize" not in n for n in names)
    return Quantized(eager(result), edges)


VARIANTS = {"static": quantized}

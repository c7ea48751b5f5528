from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized

REQUIRES = ["nncf", "openvino"]


def load() -> str:
    import nncf
    import openvino

    return f"{nncf.__version__}, openvino {openvino.__version__.split('-')[0]}"


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path, preset: str) -> Quantized:
    import nncf
    import openvino

    graph = openvino.convert_model(model, example_input=crops[:1])
    graph = nncf.quantize(
        graph,
        nncf.Dataset([crop.numpy() for crop in crops.split(1)]),
        preset=getattr(nncf.QuantizationPreset, preset),
        subset_size=len(crops),
    )
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    # NNCF stores weights as codes, so that every FakeQuantize left is an activation's
    edges = sum(node.get_type_name() == "FakeQuantize" for node in graph.get_ops())
    return Quantized(lambda x: compiled(x)[0], edges, "openvino")


VARIANTS = {
    "performance": lambda *args: quantized(*args, preset="PERFORMANCE"),  # the default: symmetric activations
    "mixed": lambda *args: quantized(*args, preset="MIXED"),
}

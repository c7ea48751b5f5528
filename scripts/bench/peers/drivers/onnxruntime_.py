from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Quantized

REQUIRES = ["onnxruntime", "onnx", "onnxscript", "sympy"]


def load() -> str:
    import onnxruntime
    import onnxruntime.quantization

    return str(onnxruntime.__version__)


def quantized(
    model: torch.nn.Module, crops: torch.Tensor, folder: Path, method: str, per_channel: bool
) -> Quantized:
    import onnx
    import onnxruntime
    from onnxruntime import quantization as q

    program = torch.onnx.export(
        model, (crops[:2],), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
    )
    program.save(folder / "raw.onnx")
    q.quant_pre_process(folder / "raw.onnx", folder / "float.onnx")
    name = onnx.load(folder / "float.onnx").graph.input[0].name

    class Crops(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter([{name: crop.numpy()} for crop in crops.split(1)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    q.quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Crops(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=getattr(q.CalibrationMethod, method),
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(folder / "int8.onnx").graph.node)
    return Quantized(lambda x: runtime.run(None, {name: x})[0], nodes["QuantizeLinear"], "onnxruntime")


def variant(method: str, per_channel: bool) -> Callable[..., Quantized]:
    return lambda *args: quantized(*args, method=method, per_channel=per_channel)


VARIANTS = {
    "MinMax, channel": variant("MinMax", True),
    "Percentile, channel": variant("Percentile", True),
    "MinMax, tensor": variant("MinMax", False),
}

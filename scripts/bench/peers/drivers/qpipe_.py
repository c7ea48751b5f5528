from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Quantized, eager

REQUIRES: list[str] = []


def load() -> str:
    from importlib.metadata import version

    import qpipe.pipeline  # noqa: F401

    return version("qpipe-quant")


def quantized(
    model: torch.nn.Module,
    crops: torch.Tensor,
    folder: Path,
    exporter: str,
    **recipe: Any,  # noqa: ANN401
) -> Quantized:
    import qpipe

    _, report = qpipe.quantize(
        model,
        [*crops.split(16)],
        task=qpipe.Task(),
        out=folder / "run",
        evaluator=[],
        exporter=[{"name": exporter, "samples": 16, "compare_fp32": False}],
        **recipe,
    )
    (artifact,) = report.artifacts
    assert artifact.module is not None
    return Quantized(eager(artifact.module), len(report.edges), artifact.engine.split()[0])


def variant(granularity: str, exporter: str = "onnx", **recipe: Any) -> Callable[..., Quantized]:  # noqa: ANN401
    return lambda *args: quantized(*args, exporter=exporter, granularity=granularity, **recipe)


VARIANTS = {
    "minmax, channel": variant("channel"),
    "percentile, channel": variant("channel", calibrator="percentile"),
    "percentile, channel, openvino": variant("channel", "openvino", calibrator="percentile"),
    "minmax, channel, openvino": variant("channel", "openvino"),
    "experiment=w8_ptq": variant("channel", finetune=["bias_correction"]),
    "experiment=w8_ptq, openvino": variant("channel", "openvino", finetune=["bias_correction"]),
    "minmax, layer": variant("layer"),
    "experiment=w8_tensor_ptq": variant(
        "layer", transform=["fold_bn", "equalize"], finetune=[{"name": "gptq", "shrinkage": 0.2}]
    ),
}

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES: list[str] = []


def load() -> str:
    from importlib.metadata import version

    import qpipe.pipeline  # noqa: F401

    return version("qpipe-quant")


def quantized(
    model: torch.nn.Module, crops: torch.Tensor, folder: Path, exporter: str, **recipe: str
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


def variant(calibrator: str, granularity: str, exporter: str = "onnx") -> Callable[..., Quantized]:
    return lambda *args: quantized(*args, exporter=exporter, calibrator=calibrator, granularity=granularity)


VARIANTS = {
    "minmax, channel": variant("minmax", "channel"),
    "percentile, channel": variant("percentile", "channel"),
    "percentile, channel, openvino": variant("percentile", "channel", "openvino"),
    "minmax, channel, openvino": variant("minmax", "channel", "openvino"),
    "minmax, layer": variant("minmax", "layer"),
}

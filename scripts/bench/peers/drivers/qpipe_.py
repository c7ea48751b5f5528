from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Quantized

REQUIRES: list[str] = []


def load() -> str:
    from importlib.metadata import version

    import qpipe.pipeline  # noqa: F401

    return version("qpipe-quant")


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path, **recipe: Any) -> Quantized:  # noqa: ANN401
    import qpipe

    _, report = qpipe.quantize(
        model,
        [*crops.split(16)],
        task=qpipe.Task(),
        out=folder / "run",
        evaluator=[],
        exporter=[{"name": "onnx", "samples": 16, "compare_fp32": False}],
        **recipe,
    )
    runtime = report.artifacts[0].module.session
    name = runtime.get_inputs()[0].name
    return Quantized(lambda x: runtime.run(None, {name: x})[0], len(report.edges), report.artifacts[0].engine)


def variant(calibrator: str, granularity: str) -> Callable[..., Quantized]:
    return lambda *args: quantized(*args, calibrator=calibrator, granularity=granularity)


VARIANTS = {
    "minmax, channel": variant("minmax", "channel"),
    "percentile, channel": variant("percentile", "channel"),
    "minmax, layer": variant("minmax", "layer"),
}

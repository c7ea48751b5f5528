from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES = ["optimum-quanto"]


def load() -> str:
    from importlib.metadata import version

    import optimum.quanto  # noqa: F401

    return version("optimum-quanto")


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with torch.no_grad(), quanto.Calibration():
        for batch in crops.split(16):
            model(batch)
    quanto.freeze(model)
    edges = sum(
        isinstance(m, quanto.QModuleMixin) and m.activation_qtype is not None for m in model.modules()
    )
    return Quantized(eager(model), edges)


VARIANTS = {"int8": quantized}

"""Give each layer's outputs the mean they have in the float model."""

from __future__ import annotations

import torch
from torch import nn

from qpipe import FinetuneStrategy, hookimpl
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.reconstruction import Layer, parameter


class BiasCorrection(LayerwiseStrategy):
    """Take the mean error of each output channel out of the bias; a layer without a bias gets one.

    Args:
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Nagel et al., 2019, arXiv 1906.04721, section 4.2 (empirical).
    """

    name = "bias_correction"

    def improve(self, layer: Layer) -> None:
        """Add the mean of what is missing."""
        dims = _all_but_channels(layer)
        size = sum(x.numel() for x in layer.targets) / len(layer.weight)
        missing = torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
        for x, target in zip(layer.inputs, layer.targets, strict=True):
            missing += (target - layer.module.forward(x)).sum(dims, dtype=torch.float64)
        if layer.module._parameters["bias"] is None:
            layer.module._parameters["bias"] = nn.Parameter(torch.zeros_like(layer.weight.flatten(1)[:, 0]))
        parameter(layer.module, "bias").add_(missing / size)


def _all_but_channels(layer: Layer) -> tuple[int, ...]:
    dims = layer.targets[0].dim()
    channel = dims - 1 if isinstance(layer.module, nn.Linear) else 1
    return tuple(d for d in range(dims) if d != channel)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer bias correction."""
    return [BiasCorrection]

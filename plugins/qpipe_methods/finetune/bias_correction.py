"""Give each layer's outputs the mean they have in the float model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpipe import FinetuneStrategy, calibration_batches, hookimpl
from qpipe.graph import Recording, record
from qpipe.nn import disabled
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.normal import normal_of
from qpipe_methods.reconstruction import Layer, float_parameter, parameter, quantized_layers

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task

log = logging.getLogger("qpipe")


class BiasCorrection(LayerwiseStrategy):
    """Take the mean error of each output channel out of the bias; a layer without a bias gets one.

    Args:
        source: of the mean: 'data' measures it, layer after layer, on what the quantized model feeds it;
            'batch_norm' multiplies the weight's error by the mean input that folded batch normalization
            promises (normal channels, clipped by ReLU or ReLU6), without data. A layer behind anything else
            stays as it is, and is named.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Nagel et al., 2019, arXiv 1906.04721, section 4.2 and appendix C (analytic), D (empirical).
    Equation: E[x] = g phi(-b / g) + b (1 - Phi(-b / g)) behind ReLU; bias - (W~ - W) E[x]
    """

    name = "bias_correction"

    def __init__(self, source: str = "data", num_samples: int = 128, memory_gb: float = 4.0) -> None:
        super().__init__(num_samples, memory_gb)
        if source not in ("data", "batch_norm"):
            raise ValueError(f"source is data or batch_norm, not {source!r}")
        self.source = source

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Correct every quantized linear and convolutional layer."""
        if self.source == "data":
            super().fit(model, reference, data, task, recipe, trainer)
            return
        args, kwargs = task.inputs(next(iter(calibration_batches(data, 1))))
        with disabled(model):
            recording = record(model, args, kwargs)
        correct_by_batch_norm(model, recording)

    def improve(self, layer: Layer) -> None:
        """Add the mean of what is missing."""
        dims = _all_but_channels(layer)
        size = sum(x.numel() for x in layer.targets) / len(layer.weight)
        missing = torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
        for x, target in zip(layer.inputs, layer.targets, strict=True):
            missing += (target - layer.module.forward(x)).sum(dims, dtype=torch.float64)
        add_to_bias(layer.module, missing / size)


@torch.no_grad()
def correct_by_batch_norm(model: nn.Module, recording: Recording) -> None:
    """Subtract from each bias what the weight's error makes of the expected input; padding is left out."""
    modules = dict(model.named_modules())
    layers = quantized_layers(model)
    left = {name for name, module in modules.items() if module in layers}
    for call in recording.calls:
        name = call.invocation.path
        normal = normal_of(call.inputs[0], modules) if name in left and call.inputs else None
        if normal is not None:
            left.remove(name)
            module: Any = modules[name]
            error = module.weight - float_parameter(model, module, "weight")
            groups = getattr(module, "groups", 1)
            rows = error.flatten(2).sum(2) if error.dim() > 2 else error
            rows = rows.reshape(groups, len(rows) // groups, -1).double()
            mean = normal[0].double().reshape(groups, -1, 1)
            add_to_bias(module, -(rows @ mean).flatten())
    if left:
        log.warning(
            "bias_correction: no batch norm says what reaches %s; left as they are", ", ".join(sorted(left))
        )


def add_to_bias(module: nn.Module, change: Tensor) -> None:
    """Add change [O] to a layer's bias, which is made where there is none."""
    if module._parameters["bias"] is None:
        module._parameters["bias"] = nn.Parameter(
            torch.zeros_like(parameter(module, "weight").flatten(1)[:, 0])
        )
    parameter(module, "bias").add_(change)


def _all_but_channels(layer: Layer) -> tuple[int, ...]:
    dims = layer.targets[0].dim()
    channel = dims - 1 if isinstance(layer.module, nn.Linear) else 1
    return tuple(d for d in range(dims) if d != channel)


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer bias correction."""
    return [BiasCorrection]

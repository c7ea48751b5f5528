"""Fold batch normalization into the layer before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qpipe import DataError, Recipe, Task, Transform, hookimpl
from qpipe.graph import Call, Recording, record, short_call
from qpipe.nn import channels_first
from qpipe.task import Batches
from qpipe_methods.normal import note_normal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Layer = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)


class FoldBatchNorm(Transform):
    """Scale a layer's output channels by gamma / sqrt(var + eps) and replace the normalization by Identity.

    Who feeds whom is recorded from one forward pass in evaluation. A normalization stays where its input is
    read by others too, where either module is called more than once, or where it has no running statistics.

    Source: Jacob et al., 2017, arXiv 1712.05877, eq. 14.
    Equation: W' = γ W / √(σ² + ε); b' = β + γ (b - μ) / √(σ² + ε)
    """

    name = "fold_bn"
    reads_slots = False

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Fold what can be folded; the function in evaluation is kept."""
        args, kwargs = next((task.inputs(batch) for batch in batches), (None, None))
        if args is None or kwargs is None:
            raise DataError("the calibration set is empty; give it at least one batch")
        args, kwargs = short_call(model, (args, kwargs), recipe.shelf.of("graph"))
        for layer, norm in _pairs(model, record(model, args, kwargs)):
            _fold(layer, norm)
            note_normal(layer, norm)
            _replace(model, norm)


def _pairs(model: nn.Module, recording: Recording) -> Iterator[tuple[_Layer, _BatchNorm]]:
    modules = dict(model.named_modules())
    times = Counter(invocation.path for invocation in recording.invocations)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for call in recording.calls:
        layer, norm = modules[call.invocation.path], _reader(call, modules)
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or norm is None:
            continue
        once = times[call.invocation.path] == times[call.outputs[0].consumers[0].invocation.path] == 1
        per_channel = not isinstance(layer, nn.Linear) or len(call.outputs[0].shape) == 2
        reads_weight = any((call.invocation.path, "weight") in value.parameters for value in call.inputs)
        if once and per_channel and reads_weight and owners[id(layer.weight)] == 1:
            yield layer, norm


def _reader(call: Call, modules: dict[str, nn.Module]) -> _BatchNorm | None:
    """Return the normalization that alone reads the call's result, and does nothing else."""
    if len(call.outputs) != 1 or call.outputs[0].is_output or len(call.outputs[0].consumers) != 1:
        return None
    reader = call.outputs[0].consumers[0]
    norm = modules[reader.invocation.path]
    if reader.op != "batch_norm" or not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return None
    is_all = [value for _, value in reader.invocation.outputs] == [*reader.outputs]
    return norm if is_all else None


@torch.no_grad()
def _fold(layer: _Layer, norm: _BatchNorm) -> None:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("the normalization has no running statistics")
    ratio = torch.rsqrt(var.double() + norm.eps)
    if norm.weight is not None:
        ratio = ratio * norm.weight.double()
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 0
    rows = channels_first(layer.weight.double(), groups)
    rows = rows * ratio.reshape(-1, *[1] * (rows.dim() - 1))
    layer.weight.copy_(channels_first(rows, groups))
    bias = -mean.double() * ratio
    if layer.bias is not None:
        bias = bias + layer.bias.double() * ratio
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _replace(model: nn.Module, old: nn.Module) -> None:
    identity = nn.Identity().train(old.training)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = identity


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer folding of batch normalization."""
    return [FoldBatchNorm]

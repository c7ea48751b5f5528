"""Balance the ranges of consecutive layers, through ReLU and ReLU6."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import DataError, Recipe, Task, Transform, hookimpl
from qpipe.graph import Call, Recording, record
from qpipe.nn import ChannelClip
from qpipe.task import Batches
from qpipe_methods.normal import rescale_normal
from qpipe_methods.transform._noise import least_noise

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_CLIPPED = (nn.ReLU6, nn.Hardtanh)
_DEAD = 1e-6  # of the largest range: a channel below it carries nothing
_BETWEEN = ("pad", "dropout", "identity")


@dataclass(frozen=True)
class Pair:
    """Two layers with at most a piecewise linear activation between them.

    Args:
        activation: path of a module to be replaced where channels are scaled; None: any scale passes it.
        width: channels between them.
    """

    first: str
    second: str
    activation: str | None
    width: int


class Equalize(Transform):
    """Divide the channels between two layers by s, multiply the next layer's inputs by s.

    The function is kept, through ReLU and through ReLU6, whose clip becomes 6 / s for each channel. A
    channel without weights on either side keeps its scale.

    Args:
        objective: 'ranges' makes both layers' weight ranges sqrt(r1 r2), as published; 'noise' minimizes the
            noise expected of the recipe's weights and activations, which ranges alone make worse where the
            activations of a layer share one scale.
        steps: passes over all pairs for 'ranges', gradient steps for 'noise'.

    Source: Nagel et al., 2019, arXiv 1906.04721, section 4.1; the clip carried along: our own derivation.
    Equation: W_1 / s, b_1 / s, W_2 s; for ranges s = √(r_1 r_2) / r_2
    """

    name = "equalize"

    def __init__(self, objective: str = "noise", steps: int = 200) -> None:
        if objective not in ("noise", "ranges"):
            raise ValueError(f"objective is noise or ranges, not {objective!r}")
        self.objective = objective
        self.steps = steps

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Scale every pair that the recording of one forward pass shows."""
        args, kwargs = next((task.inputs(batch) for batch in batches), (None, None))
        if args is None or kwargs is None:
            raise DataError("the calibration set is empty; give it at least one batch")
        pairs = [*find_pairs(model, record(model, args, kwargs))]
        if self.objective == "ranges":
            equalize_ranges(model, pairs, self.steps)
            return
        scales = least_noise(model, [(p.first, p.second) for p in pairs], batches, task, recipe, self.steps)
        for pair, scale in zip(pairs, scales, strict=True):
            rescale(model, pair, scale)


def find_pairs(model: nn.Module, recording: Recording) -> Iterator[Pair]:
    """Yield layers that read nothing but another layer's rectified result, in order of execution."""
    modules = dict(model.named_modules())
    times = Counter(invocation.path for invocation in recording.invocations)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)

    def is_layer(call: Call) -> bool:
        module = modules[call.invocation.path]
        known = isinstance(module, _LAYERS) and call.op in ("linear", "conv1d", "conv2d", "conv3d")
        return known and times[call.invocation.path] == 1 and owners[id(module.weight)] == 1

    for call in recording.calls:
        if not is_layer(call):
            continue
        activation, reader = None, _only_reader(call)
        if reader is not None and reader.op == "clamp":
            activation = reader.invocation.path
            if not isinstance(modules[activation], (*_CLIPPED, ChannelClip)) or times[activation] != 1:
                continue
        if reader is not None and reader.op in ("clamp", "relu"):
            reader = _only_reader(reader)
        while reader is not None and _passes_scale(reader):
            reader = _only_reader(reader)
        if reader is None or not is_layer(reader):
            continue
        first, second = modules[call.invocation.path], modules[reader.invocation.path]
        if isinstance(first, nn.Linear) == isinstance(second, nn.Linear):
            width = first._parameters["weight"].shape[0]
            yield Pair(call.invocation.path, reader.invocation.path, activation, width)


def _only_reader(call: Call) -> Call | None:
    value = call.outputs[0]
    return None if value.is_output or len(value.consumers) != 1 else value.consumers[0]


def _passes_scale(call: Call) -> bool:
    return call.op in _BETWEEN and not (call.op == "pad" and (call.kwargs.get("value") or _fill(call.args)))


def _fill(args: Sequence[object]) -> bool:
    return len(args) > 3 and bool(args[3])


def outputs_range(module: nn.Module) -> Tensor:
    """Return the largest magnitude of each output's weights, [O]."""
    return _weight(module).flatten(1).abs().amax(1)


def inputs_range(module: nn.Module) -> Tensor:
    """Return the largest magnitude of each input's weights, [I], over all groups."""
    weight, groups = _weight(module), getattr(module, "groups", 1)
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).abs().amax((1, 3)).flatten()


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no weight")
    return weight.detach()


def equalize_ranges(model: nn.Module, pairs: Sequence[Pair], passes: int) -> None:
    """Give the channels between the layers of each pair the range sqrt(r1 r2) on both sides.

    Source: Nagel et al., 2019, arXiv 1906.04721, eq. 11.
    """
    for _ in range(passes):
        for pair in pairs:
            first = outputs_range(model.get_submodule(pair.first))
            second = inputs_range(model.get_submodule(pair.second))
            alive = (first > _DEAD * first.max()) & (second > _DEAD * second.max())
            rescale(model, pair, torch.where(alive, (first / second).sqrt(), 1))


@torch.no_grad()
def rescale(model: nn.Module, pair: Pair, scale: Tensor) -> None:
    """Divide the channels between two layers by scale [C] > 0; the function is kept."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    weight = _weight(first)
    weight.div_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if (bias := first._parameters["bias"]) is not None:
        bias.div_(scale)
    rescale_normal(first, scale)
    weight, groups = _weight(second), getattr(second, "groups", 1)
    grouped = weight.view(groups, -1, *weight.shape[1:])
    grouped.mul_(scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2)))
    if pair.activation is not None:
        _rescale_clip(model, pair.activation, scale, weight.dim() - 2)


def _rescale_clip(model: nn.Module, path: str, scale: Tensor, spatial: int) -> None:
    clip: Any = model.get_submodule(path)
    scale = scale.reshape(-1, *[1] * spatial)
    if isinstance(clip, ChannelClip):
        low, high = clip.low / scale, clip.high / scale
    else:
        low, high = clip.min_val / scale, clip.max_val / scale
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = ChannelClip(low, high).train(clip.training)


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer equalization."""
    return [Equalize]

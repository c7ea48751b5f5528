"""What batch normalization promises of activations: normal channels, with its shift and its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qpipe.graph import Call, Value
from qpipe.nn import ChannelClip

Normal = tuple[Tensor, Tensor]  # mean and standard deviation of each channel, [C]
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")
_UNCHANGED = (
    "pad",
    "dropout",
    "identity",
    "flatten",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "mean",
    "contiguous",
)


def note_normal(layer: nn.Module, norm: _BatchNorm) -> None:
    """Keep with a layer what the normalization folded into it says of its outputs; not part of its state."""
    channels = norm.num_features
    mean = torch.zeros(channels) if norm.bias is None else norm.bias.detach()
    std = torch.ones(channels) if norm.weight is None else norm.weight.detach().abs()
    for name, value in (("normal_mean", mean), ("normal_std", std)):
        layer.register_buffer(name, value.clone(), persistent=False)


def rescale_normal(layer: nn.Module, scale: Tensor) -> None:
    """Divide what is noted of a layer's output channels by scale [C]."""
    if "normal_mean" in layer._buffers:
        for name in ("normal_mean", "normal_std"):
            layer.get_buffer(name).div_(scale)


def clipped_normal(mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> Normal:
    """Return mean and standard deviation of a normal variable clipped to low .. high, all [C].

    For low = 0 and high = inf the mean is std phi(-mean / std) + mean (1 - Phi(-mean / std)).

    Source: Nagel et al., 2019, arXiv 1906.04721, section 4.2.1 and appendix C.
    """
    mean, std = mean.double(), std.double().clamp(min=1e-12)
    below, above = (low.double() - mean) / std, (high.double() - mean) / std
    p_below, p_above = torch.special.ndtr(below), torch.special.ndtr(-above)
    inside = 1 - p_below - p_above
    f_below, f_above = _density(below), _density(above)
    first = mean * inside + std * (f_below - f_above)
    second = (mean**2 + std**2) * inside + 2 * mean * std * (f_below - f_above)
    second = second + std**2 * (_finite(below) * f_below - _finite(above) * f_above)
    first, second = first + _finite(low) * p_below, second + _finite(low).square() * p_below
    first, second = first + _finite(high) * p_above, second + _finite(high).square() * p_above
    return first, (second - first**2).clamp(min=0).sqrt()


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _finite(x: Tensor) -> Tensor:
    """Return x, 0 where it is infinite: there a normal variable has neither density nor mass."""
    return torch.where(torch.isinf(x), 0.0, x).double()


def normal_of(value: Value, modules: Mapping[str, nn.Module]) -> Normal | None:
    """Return mean and deviation of the channels of a value, None where batch normalization promises nothing.

    Sums are of independent terms; what passes a clip or a sum counts as normal again.
    """
    call = value.call
    if call is None:
        return None
    module: Any = modules[call.invocation.path]
    if call.op == "batch_norm":
        return _of_norm(module)
    if call.op in _LAYERS and "normal_mean" in module._buffers:
        return module.normal_mean, module.normal_std
    before = [normal_of(v, modules) for v in call.inputs if v.activation]
    known = [normal for normal in before if normal is not None]
    if not known or len(known) < len(before):
        return None
    mean, std = known[0]
    if call.op == "add":
        return sum(m for m, _ in known), sum(s.square() for _, s in known).sqrt()  # type: ignore[union-attr,return-value]
    if call.op in ("relu", "clamp"):
        return clipped_normal(mean, std, *_limits(call, module, mean))
    return known[0] if call.op in _UNCHANGED else None


def _of_norm(norm: Any) -> Normal | None:  # noqa: ANN401  # a module that calls batch_norm
    if not isinstance(norm, _BatchNorm) or norm.weight is None:
        return None
    return norm.bias.detach(), norm.weight.detach().abs()


def _limits(call: Call, module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, ChannelClip):
        return module.low.flatten(), module.high.flatten()
    low, high = (0.0, math.inf) if call.op == "relu" else (call.argument(1, "min"), call.argument(2, "max"))
    if call.op == "clamp" and isinstance(module, nn.Hardtanh):
        low, high = module.min_val, module.max_val
    ends = (-math.inf if low is None else low), (math.inf if high is None else high)
    return torch.full_like(like, ends[0]), torch.full_like(like, ends[1])

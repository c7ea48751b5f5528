"""A layer's output error as a quadratic form of its weight, and the levels the weight may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe import QParams, QpipeError
from qpipe.nn import FakeQuant
from qpipe_methods.reconstruction import Layer, parameter

_CHUNK = 2**24  # elements that are unfolded at once: 64 MiB
_ROWS = 128  # of a matrix of moments that are converted at once


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs x and of the outputs y it should give, for G groups of channels.

    With a bias they are taken about the means, which the bias takes up.

    Args:
        xx: [G, K, K], mean of x x'; the Hessian of half the squared error.
        xy: [G, K, O], mean of x y'.
        yy: [G, O], mean of y y.
        mean_x, mean_y: [G, K] and [G, O], zero without a bias.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor
    mean_x: Tensor
    mean_y: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """Return the mean squared output error of weight [G, O, K] for each output, [G, O]."""
        weight = weight.to(self.xx)
        linear = (weight * self.xy.transpose(1, 2)).sum(2)
        return ((weight @ self.xx) * weight).sum(2) - 2 * linear + self.yy

    def shrunk(self, share: float) -> Moments:
        """Return the moments with a share of xx's off-diagonal taken away: few photos overstate correlations.

        Call it before aimed_at, which makes xy agree.
        """
        if not share:
            return self
        diagonal = torch.diag_embed(self.xx.diagonal(dim1=1, dim2=2))
        return replace(self, xx=torch.lerp(self.xx, diagonal, share))

    def aimed_at(self, weight: Tensor) -> Moments:
        """Return the moments whose targets are what weight [G, O, K] itself makes of the inputs."""
        xy = self.xx @ weight.to(self.xx).transpose(1, 2)
        yy = (weight.to(self.xx).transpose(1, 2) * xy).sum(1)
        return replace(self, xy=xy, yy=yy)

    def in_float32(self) -> Moments:
        """Return them in single precision."""
        return Moments(*(value.float() for value in vars(self).values()))

    def damped(self, damping: float) -> Tensor:
        """Return xx with a share of its mean diagonal added; an input never seen counts as that mean."""
        return damped(self.xx, damping)

    def solution(self, weight: Tensor, damping: float) -> Tensor:
        """Return the real weight of least error, held to weight [G, O, K] by damping (ridge regression)."""
        weight = weight.to(self.xx)
        rest = self.xy - self.xx @ weight.transpose(1, 2)
        change: Tensor = torch.linalg.solve(self.damped(damping), rest)
        return weight + change.transpose(1, 2)


def damped(xx: Tensor, damping: float) -> Tensor:
    """Return xx [G, K, K] with a share of its mean diagonal added; an unseen input counts as that mean."""
    result = xx.clone()
    result.diagonal(dim1=1, dim2=2).add_(added_by(damping, xx))
    return result


def added_by(damping: float, xx: Tensor) -> Tensor:
    """Return what damped adds to the diagonal, [G, K]."""
    diagonal = xx.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(xx.dtype).tiny)
    unseen = diagonal <= 1e-12 * mean
    return damping * mean + torch.where(unseen, mean, 0)


def moments(layer: Layer) -> Moments:
    """Sum up what reaches a layer and what it should give, in float64."""
    centred = layer.module._parameters.get("bias") is not None
    xx: Tensor | None = None
    xy: Tensor | None = None
    yy = sum_x = sum_y = torch.zeros((), dtype=torch.float64)
    count = 0
    for x, y in _rows(layer):
        count += x.shape[2]
        xx, xy = _plus(xx, x @ x.mT), _plus(xy, x @ y.mT)
        yy = yy + y.square().sum(2).double()
        sum_x, sum_y = sum_x + x.sum(2).double(), sum_y + y.sum(2).double()
    if xx is None or xy is None:
        raise QpipeError(f"nothing reached '{layer.name}'")
    mean_x, mean_y = sum_x / count * centred, sum_y / count * centred
    xx, xy = xx.div_(count), xy.div_(count)
    if centred:
        _centre(xx, mean_x, mean_x)
        _centre(xy, mean_x, mean_y)
    return Moments(xx, xy, yy / count - mean_y.square(), mean_x, mean_y)


def _plus(total: Tensor | None, x: Tensor) -> Tensor:
    """Add x [G, K, *] to a total in float64, in place, and return it."""
    if total is None:
        return x.double()
    for into, part in zip(torch.split(total, _ROWS, 1), torch.split(x, _ROWS, 1), strict=True):
        into += part  # converted row by row: no second matrix in float64
    return total


def _centre(products: Tensor, left: Tensor, right: Tensor) -> None:
    """Take the product of the means [G, K] and [G, *] from mean products [G, K, *], in place."""
    for into, mean in zip(torch.split(products, _ROWS, 1), torch.split(left, _ROWS, 1), strict=True):
        into -= mean[:, :, None] * right[:, None]


def goal_of(
    of: Moments, weight: Tensor, match: str, ridge: float, shrinkage: float = 0.0
) -> tuple[Tensor, Moments]:
    """Return the real weight [G, O, K] to round, and the moments by which roundings are judged.

    Args:
        match: 'layer' takes the float weight; 'float' the weight that best gives the float model's outputs.
        ridge: holds the latter to the float weight.
        shrinkage: of the moments by which roundings are judged.
    """
    weight = weight.to(of.xx)
    aim = of.solution(weight, ridge) if match == "float" else weight
    return aim, of.shrunk(shrinkage).aimed_at(aim)


def no_worse(rounded: Tensor, nearest: Tensor, goal: Moments) -> Tensor:
    """Return rounded, and nearest for the outputs where that has less error; both [G, O, K]."""
    better = goal.error(rounded) <= goal.error(nearest)
    return torch.where(better[:, :, None], rounded, nearest)


def _rows(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs [G, K, N] and targets [G, O, N], a column for each product of weight and input."""
    groups = getattr(layer.module, "groups", 1)
    for x, y in zip(layer.inputs, layer.targets, strict=True):
        if isinstance(layer.module, nn.Linear):
            yield x.reshape(1, -1, x.shape[-1]).mT, y.reshape(1, -1, y.shape[-1]).mT
            continue
        size = max(1, _CHUNK // max(1, layer.weight[0].numel() * groups * y[0, 0].numel()))
        for part, target in zip(torch.split(x, size), torch.split(y, size), strict=True):
            yield _grouped(_unfold(layer.module, part), groups), _grouped(target.flatten(2), groups)


def input_products(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401  # a linear or a convolution layer
    """Return the sum of x x' over what a layer's weight is multiplied with, [G, K, K] in float64."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
        return (rows.mT @ rows).double()
    size = max(1, _CHUNK // (x[0].numel() * module.weight[0, 0].numel()))
    parts = (_grouped(_unfold(module, part), module.groups) for part in torch.split(x, size))
    return torch.stack([(part @ part.mT).double() for part in parts]).sum(0)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x), groups, -1, x.shape[2]).permute(1, 2, 0, 3).flatten(2)


def _unfold(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401  # a convolution
    """Return [B, C * kernel, L]; of a pointwise convolution a view."""
    dims = len(module.kernel_size)
    if any(p != 0 for p in module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, (size - 1) * gap + 1, step)[..., ::gap]
    kernel = range(2 + dims, 2 + 2 * dims)
    return x.permute(0, 1, *kernel, *range(2, 2 + dims)).flatten(2 + dims).flatten(1, 1 + dims)


class Levels:
    """The levels of a layer's weight, element by element: [G, O, K], whatever quantizer and granularity.

    Args:
        layer: calibrated.
    """

    def __init__(self, layer: Layer) -> None:
        self.fake_quant: FakeQuant = layer.fake_quant
        self.shape = layer.weight.shape
        self.groups = getattr(layer.module, "groups", 1)
        granularity = self.fake_quant.slot.granularity
        blocks = granularity.to_blocks(layer.weight)
        numbers = torch.arange(len(blocks), device=blocks.device)[:, None].expand(blocks.shape)
        self.block = self.rows(granularity.from_blocks(numbers, self.shape))  # which one an element is in
        self.num_blocks = len(blocks)

    @property
    def apart(self) -> bool:
        """Whether no two outputs share a scale."""
        return int(torch.bincount(self.block.flatten(0, 1)[:, 0]).max()) == 1

    def rows(self, weight: Tensor) -> Tensor:
        """View a weight [O, *] as [G, O / G, K]."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, rows: Tensor) -> Tensor:
        """Undo rows."""
        return rows.reshape(self.shape)

    def round(self, x: Tensor) -> Tensor:
        """Return the level nearest to each element of x [G, O, K]."""
        slot = self.fake_quant.slot
        blocks = slot.granularity.to_blocks(self.weight(x).float())
        codes = slot.quantizer.quantize(blocks, self.fake_quant.qparams(), slot.spec)
        rounded = slot.quantizer.dequantize(codes, self.fake_quant.qparams(), slot.spec)
        return self.rows(slot.granularity.from_blocks(rounded, self.shape)).to(x)

    def round_column(self, x: Tensor, column: Tensor | int) -> Tensor:
        """Return the level nearest to each element of x [G, O]: of a column, or of one a group [G]."""
        if isinstance(column, int):
            block = self.block[:, :, column]
        else:
            block = self.block.gather(2, column[:, None, None].expand(-1, x.shape[1], 1))
        slot, qparams = self.fake_quant.slot, self.qparams(block.flatten())
        codes = slot.quantizer.quantize(x.reshape(-1, 1).float(), qparams, slot.spec)
        return slot.quantizer.dequantize(codes, qparams, slot.spec).reshape(x.shape).to(x)

    def qparams(self, block: Tensor) -> QParams:
        """Return the parameters of blocks [n], a row each."""
        of = self.fake_quant.qparams()
        extra = {name: value[block] for name, value in of.extra.items()}
        return QParams(of.scale[block], of.zero_point[block], extra)

    def per_element(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero_point of each element, [G, O, K]."""
        of = self.fake_quant.qparams()
        return of.scale[:, 0][self.block], of.zero_point[:, 0][self.block]


def keep(layer: Layer, levels: Levels, rows: Tensor, of: Moments) -> None:
    """Store a weight [G, O, K] and the bias that gives the targets' means."""
    layer.weight.copy_(levels.weight(rows))
    set_bias(layer, levels, rows, of)


def set_bias(layer: Layer, levels: Levels, rows: Tensor, of: Moments) -> None:
    """Store the bias that gives the targets' means, where there is one."""
    if layer.module._parameters.get("bias") is not None:
        mean = torch.einsum("gok,gk->go", rows.to(of.mean_x), of.mean_x)
        parameter(layer.module, "bias").copy_((of.mean_y - mean).flatten())

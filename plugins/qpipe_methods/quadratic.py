"""A layer's output error as a quadratic form of its weight, and the levels the weight may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe import QParams, QpipeError
from qpipe.nn import FakeQuant, on_blocks
from qpipe_methods.reconstruction import Layer, parameter

_CHUNK = 2**24  # elements that are unfolded at once: 64 MiB
_PRECISE = 2**24  # bytes of a matrix of moments up to which it is kept in float64
_COLUMNS = 128  # whose parameters are looked up at once


@dataclass(frozen=True)
class Goal:
    """What roundings of a layer's weight are judged by, for G groups of channels.

    With a bias the moments are taken about the means, which the bias takes up.

    Args:
        aim: [G, O, K], the real weight to round; the layer's own is not copied.
        xx: [G, K, K], mean of x x' over the layer's inputs x; the Hessian of half the squared error.
        mean_x: [G, K], mean of the inputs, zero without a bias.
        mean_y: [G, O], mean of the outputs the layer should give, zero without a bias.
    """

    aim: Tensor
    xx: Tensor
    mean_x: Tensor
    mean_y: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """Return the mean squared distance from the outputs of aim for each output of weight, [G, O]."""
        change = weight.to(self.xx) - self.aim
        return ((change @ self.xx) * change).sum(2)

    def in_float32(self) -> Goal:
        """Return it in single precision."""
        return Goal(*(value.float() for value in vars(self).values()))


def goal_of(layer: Layer, match: str = "layer", ridge: float = 0.0) -> Goal:
    """Sum up what reaches a layer, and say which real weight to round.

    Moments are in float64, where xx takes at most 16 MiB then; else in float32.

    Args:
        match: 'layer' takes the float weight; 'float' the weight that best gives the float model's outputs.
        ridge: share of xx's mean diagonal that holds the latter to the float weight.

    Raises:
        QpipeError: nothing reached the layer.
    """
    weight = rows_of(layer.module, layer.weight).float()
    groups, outputs, inputs = weight.shape
    dtype = torch.float64 if 8 * groups * inputs**2 <= _PRECISE else torch.float32
    xx = weight.new_zeros(groups, inputs, inputs, dtype=dtype)
    xy = weight.new_zeros(groups, inputs, outputs, dtype=dtype) if match == "float" else None
    sum_x, sum_y = (weight.new_zeros(groups, n, dtype=torch.float64) for n in (inputs, outputs))
    count = 0
    for x, y in _rows(layer):
        count += x.shape[2]
        _add_product(xx, x, x)
        if xy is not None:
            _add_product(xy, x, y)
        sum_x, sum_y = sum_x + x.sum(2), sum_y + y.sum(2)
    if not count:
        raise QpipeError(f"nothing reached '{layer.name}'")
    centred = layer.module._parameters.get("bias") is not None
    mean_x, mean_y = ((total / count * centred).to(xx) for total in (sum_x, sum_y))
    _mean(xx, count, mean_x, mean_x)
    if xy is None:
        return Goal(weight, xx, mean_x, mean_y)
    _mean(xy, count, mean_x, mean_y)
    return Goal(solution(xx, xy, weight.to(xx), ridge), xx, mean_x, mean_y)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y' to a total, in place: x [G, K, N] and y [G, *, N] in float32."""
    if total.dtype == x.dtype:
        total.baddbmm_(x, y.mT)
    else:
        total += x @ y.mT


def _mean(products: Tensor, count: int, left: Tensor, right: Tensor) -> None:
    """Make of summed products [G, K, *] their mean about the means [G, K] and [G, *], in place."""
    products.baddbmm_(left[:, :, None], right[:, None], beta=1 / count, alpha=-1)


def solution(xx: Tensor, xy: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Return the weight of least squared error under x x' and x y', held to weight [G, O, K] by ridge.

    Args:
        xx, xy: [G, K, K] and [G, K, O].
        ridge: share of xx's mean diagonal; more holds tighter.
    """
    factor = torch.linalg.cholesky(damped(xx, ridge))
    return weight + torch.cholesky_solve(xy - xx @ weight.mT, factor).mT


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


def shrink(xx: Tensor, share: float) -> None:
    """Take a share of the off-diagonal away, in place: few photos overstate correlations."""
    if share:
        diagonal = xx.diagonal(dim1=1, dim2=2).clone()
        xx.mul_(1 - share).diagonal(dim1=1, dim2=2).copy_(diagonal)


def fall_back(rounded: Tensor, nearest: Tensor, error: Callable[[Tensor], Tensor]) -> None:
    """Overwrite the outputs of rounded that err more than those of nearest by these; both [G, O, K].

    Args:
        error: of each output of a weight, [G, O, K] -> [G, O].
    """
    worse = error(rounded) > error(nearest)
    rounded[worse] = nearest[worse]


def _rows(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs [G, K, N] and targets [G, O, N], a column for each product of weight and input."""
    groups = getattr(layer.module, "groups", 1)
    for x, y in zip(layer.inputs, layer.targets, strict=True):
        x, y = x.float(), y.float()
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


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """View a layer's weight [O, *] as [G, O / G, K]."""
    groups: int = getattr(module, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


class Levels:
    """The levels of a layer's weight, element by element: [G, O, K], whatever quantizer and granularity.

    Args:
        layer: calibrated.
    """

    def __init__(self, layer: Layer) -> None:
        self.fake_quant: FakeQuant = layer.fake_quant
        self.module = layer.module
        self.shape = layer.weight.shape
        self.device = layer.weight.device
        blocks = self.fake_quant.slot.granularity.to_blocks(torch.empty(self.shape, device="meta"))
        self.num_blocks, self._block_size = blocks.shape
        block = self.block
        self._of_rows, self._of_columns = block[:, :, :1].clone(), block[:, :1] - block[:, :1, :1]
        if not torch.equal(self._of_rows + self._of_columns, block):  # blocks that form no grid
            self._of_rows, self._of_columns = torch.zeros_like(self._of_rows), block

    @property
    def block(self) -> Tensor:
        """The block each element is in, [G, O, K]: made anew, as large as the weight."""
        numbers = torch.arange(self.num_blocks, dtype=torch.int32, device=self.device)[:, None]
        spread = numbers.expand(-1, self._block_size)
        return self.rows(self.fake_quant.slot.granularity.from_blocks(spread, self.shape))

    @property
    def apart(self) -> bool:
        """Whether no two outputs share a scale."""
        first = self._of_rows + self._of_columns[:, :, :1]
        return int(torch.bincount(first.flatten()).max()) == 1

    def rows(self, weight: Tensor) -> Tensor:
        """View a weight [O, *] as [G, O / G, K]."""
        return rows_of(self.module, weight)

    def weight(self, rows: Tensor) -> Tensor:
        """Undo rows."""
        return rows.reshape(self.shape)

    def round(self, x: Tensor) -> Tensor:
        """Return the level nearest to each element of x [G, O, K], in float32."""
        rounded = on_blocks(self.fake_quant.slot, self.weight(x).float(), self.fake_quant.qparams())
        return self.rows(rounded)

    def columns(self, index: Tensor) -> Iterator[QParams]:
        """Yield the parameters of columns, one of each group at a time: [G * O, 1] each.

        Args:
            index: [G, columns].
        """
        of = self.fake_quant.qparams()
        for part in torch.split(index, _COLUMNS, 1):
            columns = self._of_columns.gather(2, part[:, None].expand(-1, self._of_columns.shape[1], -1))
            block = (self._of_rows + columns).permute(2, 0, 1).flatten(1)
            scale, zero_point = of.scale[block], of.zero_point[block]
            extra = {name: value[block] for name, value in of.extra.items()}
            for i in range(len(block)):
                yield QParams(scale[i], zero_point[i], {name: value[i] for name, value in extra.items()})

    def round_column(self, x: Tensor, qparams: QParams) -> Tensor:
        """Return the level nearest to each element of x [G, O], a column with these parameters."""
        slot = self.fake_quant.slot
        rounded = slot.quantizer.settled().fake_quantize(x.reshape(-1, 1).float(), qparams, slot.spec)
        return rounded.reshape(x.shape).to(x)

    def per_element(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero_point of each element, [G, O, K]."""
        of = self.fake_quant.qparams()
        return of.scale[:, 0][self.block], of.zero_point[:, 0][self.block]


def keep(layer: Layer, levels: Levels, rows: Tensor, goal: Goal) -> None:
    """Store a weight [G, O, K] and the bias that gives the targets' means."""
    layer.weight.copy_(levels.weight(rows))
    set_bias(layer, rows, goal)


def set_bias(layer: Layer, rows: Tensor, goal: Goal) -> None:
    """Store the bias with which weight [G, O, K] gives the targets' means, where there is one."""
    if layer.module._parameters.get("bias") is not None:
        mean = torch.einsum("gok,gk->go", rows.to(goal.mean_x), goal.mean_x)
        parameter(layer.module, "bias").copy_((goal.mean_y - mean).flatten())

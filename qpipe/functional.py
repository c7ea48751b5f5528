"""The arithmetic of quantization, on blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpipe.types import QParams, QuantSpec


class _StraightThrough(torch.autograd.Function):
    """Return the second argument, send its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401  # autograd's own context
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return value with the gradient of x (Bengio et al., 2013, arXiv 1308.3432)."""
    result: Tensor = _StraightThrough.apply(x, value)
    return result

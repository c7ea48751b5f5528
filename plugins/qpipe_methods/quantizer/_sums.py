"""Levels that are sums of a few coefficients, each bit of a code choosing one's sign or presence."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe.levels import midpoints


def patterns(num_bits: int, off: float, like: Tensor) -> Tensor:
    """Return the coefficients of every code [2^num_bits, num_bits]: 1 where its bit is set, else off."""
    codes = torch.arange(2**num_bits, device=like.device).unsqueeze(1)
    bits = codes >> torch.arange(num_bits, device=like.device) & 1
    return torch.where(bits > 0, 1.0, off).to(like.dtype)


def nearest_sums(x: Tensor, basis: Tensor, off: float) -> Tensor:
    """Return the code of the sum nearest to each x [B, N], for coefficients basis [B, K]."""
    levels, order = (basis @ patterns(basis.shape[1], off, basis).T).sort(-1)
    index = torch.searchsorted(midpoints(levels).to(x.dtype), x.contiguous())
    return order.gather(-1, index).to(x.dtype)


def sums(codes: Tensor, basis: Tensor, off: float) -> Tensor:
    """Return the sums [B, N] that codes stand for."""
    levels = basis @ patterns(basis.shape[1], off, basis).T
    return levels.gather(-1, codes.long())

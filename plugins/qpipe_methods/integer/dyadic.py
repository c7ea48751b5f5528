"""Real factors as b / 2^c, and rounding after multiplying by them, in integers."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_SHIFT = 62  # of a 64-bit product


def dyadic(factor: Tensor, num_bits: int = 31) -> tuple[Tensor, Tensor]:
    """Write factors > 0 as b / 2^c, b of num_bits bits.

    With 31 bits b is M0 in Q31 and c is 31 + n, where factor = 2^-n M0 and 0.5 <= M0 < 1. A factor below
    2^-62 keeps fewer bits, one of 2^num_bits or more cannot be written.

    Returns:
        b int32, c int32, of factor's shape.

    Source: Jacob et al., 2017, 1712.05877, section 2.2; b / 2^c as in HAWQ-V3, Yao et al., 2020, 2011.10680.
    """
    mantissa, exponent = torch.frexp(factor.double())  # 0.5 <= mantissa < 1
    shift = (num_bits - exponent).clamp_max(_MAX_SHIFT)
    b = torch.round(torch.ldexp(mantissa, shift + exponent)).long()
    full = b == 1 << num_bits  # the mantissa was rounded up to 1
    return torch.where(full, b >> 1, b).int(), (shift - full.int()).int()


def shared_dyadic(factors: Tensor, num_bits: int) -> tuple[Tensor, int]:
    """Write factors [N] as b / 2^c with one c; the largest b has num_bits bits.

    Source: HAWQ-V3, section 3.2: the two branches of a residual sum are rescaled to the result's units.
    """
    _, shift = dyadic(factors.max(), num_bits)
    c = int(shift)
    return torch.round(torch.ldexp(factors.double(), torch.tensor(c))).int(), c


def shift_right(x: Tensor, c: Tensor | int) -> Tensor:
    """Return x / 2^c rounded to nearest, half to even; int64, c >= 1."""
    c = torch.as_tensor(c).long()
    half = torch.ones_like(c) << (c - 1)
    result = (x + half) >> c
    tie = (x & ((half << 1) - 1)) == half
    return result - (tie & (result & 1).bool()).long()


def rescale(accumulator: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return accumulator * b / 2^c rounded half to even: 32 x 32 bits give 64, then a shift."""
    return shift_right(accumulator.long() * b.long(), c)

"""Round to the 16 levels that a normal distribution fills evenly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Role, Statistics, hookimpl
from qpipe.functional import Rounding, scale_eps, straight_through
from qpipe.levels import nearest_codes, take_levels
from qpipe_methods.quantizer._magnitude import largest

_GROUP = 256  # scales that share a second scale
_E4M3_LARGEST = 448.0


class NF4Quantizer(Quantizer[Statistics]):
    """NormalFloat of 4 bits: levels from -1 to 1 times the largest magnitude of the block, 0 among them.

    Made for blocks of 64: granularity=subchannel granularity.group_size=64.

    Args:
        double_quantization: store scales as FP8 (E4M3) around their mean, with a float32 scale for each 256.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Dettmers et al., "QLoRA", 2023, arXiv 2305.14314, eq. 4 and section 3.
    Equation: q_i = (Φ^-1(i / 2^k+1) + Φ^-1((i + 1) / 2^k+1)) / 2 as built in two halves around an exact 0
    """

    name = "nf4"
    roles = frozenset({Role.WEIGHT})
    stand_in = {Role.ACTIVATION: "uniform"}  # noqa: RUF012

    def __init__(self, double_quantization: bool = False, rounding: Rounding = "nearest") -> None:
        self.double_quantization = double_quantization
        self.rounding = rounding

    def check(self, spec: QuantSpec) -> None:
        """Refuse other than 4 bits."""
        if spec.num_bits != 4:
            raise RecipeError(
                f"quantizer 'nf4' has 16 levels, not those of {spec.num_bits} bits; "
                f"set {spec.role.value}.num_bits=4"
            )

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Put the outer levels at the larger end of each block's range."""
        bound = largest(stats, range, spec)
        zero_point = torch.zeros_like(bound)
        if not self.double_quantization:
            return QParams(bound, zero_point)
        mean = bound.mean(0, keepdim=True)
        centred = bound - mean
        groups = F.pad(centred.flatten(), (0, -len(centred) % _GROUP)).view(-1, _GROUP)
        group_scale = (groups.abs().amax(1, keepdim=True) / _E4M3_LARGEST).clamp(min=scale_eps(4))
        ratio = centred / _per_block(group_scale, len(centred))
        byte = ratio.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return QParams(byte, zero_point, {"group_scale": group_scale, "mean": mean})

    def rows(self, qparams: QParams, rows: slice) -> QParams:
        """Return the parameters of some blocks, their scales in float32."""
        return QParams(self.scales(qparams)[rows], qparams.zero_point[rows])

    def scales(self, qparams: QParams) -> Tensor:
        """Return the scales in float32, from the bytes they are stored in."""
        stored = qparams.scale
        if stored.is_floating_point():
            return stored
        centred = stored.view(torch.float8_e4m3fn).float() * _per_block(
            qparams.extra["group_scale"], len(stored)
        )
        return (centred + qparams.extra["mean"]).clamp(min=scale_eps(4))

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the index, 0 to 15, of the nearest level."""
        return nearest_codes(x / self.scales(qparams), _levels(x), self.rounding)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the levels times the scale."""
        return take_levels(codes, _levels(codes)) * self.scales(qparams)

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes between the outer ones."""
        bound = self.scales(qparams)
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        return straight_through(torch.minimum(torch.maximum(x, -bound), bound), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes count the levels from 0."""
        return 0


def nf4_levels() -> Tensor:
    """Return the 16 levels, ascending, in float64: 8 quantiles above 0, 7 below, over the largest."""
    offset = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return levels / levels.max()


def _levels(like: Tensor) -> Tensor:
    return nf4_levels().to(like).unsqueeze(0)


def _per_block(group_scale: Tensor, num_blocks: int) -> Tensor:
    return group_scale.repeat_interleave(_GROUP, 0)[:num_blocks]


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer NormalFloat."""
    return [NF4Quantizer]

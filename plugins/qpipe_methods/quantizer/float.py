"""Round to a small floating-point format: FP8, FP6, FP4, and with block scales MX and NVFP4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Role, Statistics, hookimpl
from qpipe.functional import Rounding, round_codes, straight_through
from qpipe.levels import power_of_two
from qpipe_methods.quantizer._magnitude import largest

_E4M3_LARGEST, _E4M3_LEAST = 448.0, 2.0**-9


@dataclass(frozen=True)
class Format:
    """A sign, exponent and mantissa; without exponent bits a fixed-point number below 2.

    Args:
        specials: codes lost to infinity and NaN: 'ieee' the top exponent, 'nan' the top code, 'none' none.
    """

    exponent_bits: int
    mantissa_bits: int
    specials: str

    @property
    def steps(self) -> int:
        """Numbers in one octave."""
        return 1 << self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Exponent of the least normal number; subnormal ones share its spacing."""
        return 2 - (1 << self.exponent_bits - 1) if self.exponent_bits else 1

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        code = (self.steps << self.exponent_bits) - 1
        code -= {"none": 0, "nan": 1, "ieee": self.steps}[self.specials]
        field, mantissa = divmod(code, self.steps)
        significand = mantissa + (self.steps if field else 0)
        return math.ldexp(significand, max(field - 1, 0) + self.least_exponent - self.mantissa_bits)


class FloatQuantizer(Quantizer[Statistics]):
    """Levels of a sign, exponent_bits and mantissa_bits, times the scale of the block.

    The code is the format's own bit pattern, sign bit first; what exceeds the largest number saturates.

    Args:
        exponent_bits: of num_bits; null takes half of them (E4M3, E3M2, E2M1); 0 is fixed point (MXINT8).
        mantissa_bits: null takes what sign and exponent leave.
        specials: codes that stand for no number: 'ieee' (top exponent), 'nan' (top code), 'none'; null takes
            what OCP standardised: nan for E4M3, ieee for other 8-bit formats, none below 8 bits.
        block_scale: 'float32' puts the largest number at the end of the range; 'e8m0' is a power of two (MX);
            'e4m3' times one float32 scale a tensor (NVFP4). Both are stored as their byte.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest, half to even.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv 2209.05433, table 1; Rouhani et
    al., "Microscaling Data Formats for Deep Learning", 2023, arXiv 2310.10537, algorithm 1.
    Equation: X = 2^(floor(log2 amax) - e_max); Q = X · RNE(x / X), saturating
    """

    name = "float"

    def __init__(
        self,
        exponent_bits: int | None = None,
        mantissa_bits: int | None = None,
        specials: Literal["ieee", "nan", "none"] | None = None,
        block_scale: Literal["float32", "e8m0", "e4m3"] = "float32",
        rounding: Rounding = "nearest",
    ) -> None:
        if block_scale not in ("float32", "e8m0", "e4m3"):
            raise RecipeError(f"quantizer.block_scale={block_scale} is unknown; use float32, e8m0 or e4m3")
        if specials not in (None, "ieee", "nan", "none"):
            raise RecipeError(f"quantizer.specials={specials} is unknown; use ieee, nan or none")
        self.exponent_bits = exponent_bits
        self.mantissa_bits = mantissa_bits
        self.specials = specials
        self.block_scale = block_scale
        self.rounding = rounding

    def check(self, spec: QuantSpec) -> None:
        """Refuse bits that do not add up, and what float32 cannot hold."""
        key = f"{spec.role.value}.num_bits"
        if self.exponent_bits is not None and self.mantissa_bits is not None:
            wanted = 1 + self.exponent_bits + self.mantissa_bits
            if spec.num_bits != wanted:
                raise RecipeError(
                    f"a sign, exponent_bits={self.exponent_bits} and mantissa_bits={self.mantissa_bits} "
                    f"make {wanted} bits, not {spec.num_bits}; set {key}={wanted}, "
                    f"or another {spec.role.value}.quantizer"
                )
        if not 3 <= spec.num_bits <= 16:
            raise RecipeError(f"quantizer 'float' has formats of 3 to 16 bits, not {key}={spec.num_bits}")
        found = self.format(spec)
        if not 0 <= found.exponent_bits <= 7 or found.mantissa_bits < (0 if found.exponent_bits else 1):
            raise RecipeError(
                f"quantizer 'float' has no format of {spec.num_bits} bits with {found.exponent_bits} for the "
                f"exponent; use 0 to {min(7, spec.num_bits - 1)}"
            )

    def format(self, spec: QuantSpec) -> Format:
        """Return the format that fills the bits of spec."""
        exponent_bits = self.exponent_bits
        if exponent_bits is None:
            rest = self.mantissa_bits
            exponent_bits = spec.num_bits // 2 if rest is None else spec.num_bits - 1 - rest
        standard = (
            "none" if spec.num_bits < 8 or not exponent_bits else "nan" if exponent_bits == 4 else "ieee"
        )
        return Format(exponent_bits, spec.num_bits - 1 - exponent_bits, self.specials or standard)

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit the scale of each block to the larger end of its range."""
        bound = largest(stats, range, spec)
        zero_point = torch.zeros_like(bound)
        number = self.format(spec).largest
        if self.block_scale == "e8m0":
            exponent = torch.frexp(bound).exponent - torch.frexp(torch.tensor(number)).exponent
            return QParams((exponent + 127).clamp(1, 254).to(torch.uint8), zero_point)
        if self.block_scale == "e4m3":
            # activations are ranged many tensors at once: each block is then a tensor of its own
            whole = bound.amax(0, keepdim=True) if spec.role is Role.WEIGHT else bound
            tensor_scale = whole / (_E4M3_LARGEST * number)
            ratio = (bound / number / tensor_scale).clamp(_E4M3_LEAST, _E4M3_LARGEST)
            byte = ratio.to(torch.float8_e4m3fn).view(torch.uint8)
            return QParams(byte, zero_point, {"tensor_scale": tensor_scale})
        return QParams(bound / number, zero_point)

    def rows(self, qparams: QParams, rows: slice) -> QParams:
        """Return the parameters of some blocks, their scales in float32."""
        return QParams(self.scales(qparams)[rows], qparams.zero_point[rows])

    def scales(self, qparams: QParams) -> Tensor:
        """Return the scales in float32, from the bytes they are stored in."""
        stored = qparams.scale
        if stored.is_floating_point():
            return stored
        if self.block_scale == "e8m0":
            return power_of_two(stored.int() - 127)
        return stored.view(torch.float8_e4m3fn).float() * qparams.extra["tensor_scale"]

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the bit patterns of x / scale."""
        number = self.format(spec)
        ratio = x / self.scales(qparams)
        magnitude = ratio.abs().clamp(max=number.largest)
        exponent = torch.frexp(magnitude.clamp(min=2.0**number.least_exponent)).exponent - 1
        significand = round_codes(magnitude * power_of_two(number.mantissa_bits - exponent), self.rounding)
        pattern = (exponent - number.least_exponent) * number.steps + significand
        return pattern + torch.signbit(ratio) * (1 << spec.num_bits - 1)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the numbers of those bit patterns, times the scale."""
        number = self.format(spec)
        negative = codes >= 1 << spec.num_bits - 1
        pattern = codes - negative * (1 << spec.num_bits - 1)
        field = torch.floor(pattern / number.steps)
        significand = pattern - (field - 1).clamp(min=0) * number.steps
        exponent = (field - 1).clamp(min=0) + (number.least_exponent - number.mantissa_bits)
        signed = torch.where(negative, -significand, significand)
        return signed * power_of_two(exponent) * self.scales(qparams)

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes where x does not saturate."""
        bound = self.scales(qparams) * self.format(spec).largest
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        return straight_through(torch.minimum(torch.maximum(x, -bound), bound), value)

    def code_min(self, spec: QuantSpec) -> int:
        """Codes are bit patterns."""
        return 0


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer minifloats."""
    return [FloatQuantizer]

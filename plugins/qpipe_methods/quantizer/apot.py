"""Round to sums of a few powers of two: denser near zero than uniform, less empty near the end than log."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Statistics, hookimpl
from qpipe.functional import Rounding, straight_through
from qpipe.levels import nearest_codes, take_levels
from qpipe_methods.quantizer._magnitude import bounded, join, largest, num_magnitudes, zero_code


class APoTQuantizer(Quantizer[Statistics]):
    """Levels ±scale · (p_0 + … + p_{n-1}) / max, p_i in {0, 2^-i, 2^-(i+n), …, 2^-(i+(2^k-2)n)}.

    Code c - zero_point = ±i stands for ± the i-th of the ascending sums; the largest is the end of the range.
    With a sign bit the b - 1 bits left seldom are a multiple of k: the r bits over then form one more term,
    which in the last 2^r - 1 rounds takes its power first (the authors' code does so for 3 and 5 bits).

    Args:
        term_bits: k, bits of one power of two; num_bits (less the sign) gives plain powers of two.
        rounding: 'stochastic' while a model trains; evaluation and export round to nearest.

    Source: Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv 1909.13144, eq. 5.
    Equation: Q = γ { Σ p_i }, p_i in {0, 2^-i, 2^-(i+n), …}
    """

    name = "apot"

    def __init__(self, term_bits: int = 2, rounding: Rounding = "nearest") -> None:
        if term_bits < 1:
            raise RecipeError(f"quantizer.term_bits={term_bits} is too few; use 1 or more")
        self.term_bits = term_bits
        self.rounding = rounding

    def check(self, spec: QuantSpec) -> None:
        """Refuse what has no levels, or more than float32 tells apart."""
        if not 2 <= spec.num_bits <= 8:
            raise RecipeError(f"quantizer 'apot' has levels for 2 to 8 bits, not num_bits={spec.num_bits}")

    def fit(self, stats: Statistics, range: Range | None, spec: QuantSpec) -> QParams:
        """Put the largest level at the end of the range."""
        return QParams(largest(stats, range, spec), zero_code(stats, range, spec))

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return zero_point ± the index of the magnitude nearest to |x|."""
        ratio = x.abs() / qparams.scale
        return join(x, nearest_codes(ratio, self._table(qparams, spec), self.rounding), qparams, spec)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return ±scale times the magnitude of that index."""
        signed = codes - qparams.zero_point
        return torch.sign(signed) * take_levels(signed.abs(), self._table(qparams, spec)) * qparams.scale

    def fake_quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Round x to its levels; the gradient passes up to the largest level."""
        value = self.dequantize(self.quantize(x, qparams, spec), qparams, spec)
        return straight_through(bounded(x, qparams.scale, qparams, spec), value)

    def _table(self, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the magnitudes, [1, L], or [B, L] where blocks differ in having a sign."""
        half = apot_levels(spec.num_bits - 1, self.term_bits)
        if spec.signed:
            return torch.tensor([half]).to(qparams.scale)
        padded = half + (float("inf"),) * len(half)  # never the nearest
        tables = torch.tensor([apot_levels(spec.num_bits, self.term_bits), padded]).to(qparams.scale)
        has_sign = num_magnitudes(qparams, spec) < 2**spec.num_bits - 1
        return tables[has_sign.flatten().long()]


@lru_cache
def apot_levels(num_bits: int, term_bits: int) -> tuple[float, ...]:
    """Return the 2^num_bits sums, ascending from 0 to 1."""
    num_terms, rest = divmod(num_bits, term_bits)
    terms: list[list[float]] = [[0.0] for _ in range(num_terms + 1)]  # the last one holds the bits left over
    exponent = 0
    rounds = 2**term_bits - 1
    for turn in range(rounds):
        takers = terms[:num_terms]
        if turn >= rounds - (2**rest - 1):
            takers = [terms[-1], *takers]
        for term in takers:
            exponent -= 1
            term.append(2.0**exponent)
    sums = sorted(sum(chosen) for chosen in product(*terms))
    return tuple(level / sums[-1] for level in sums)


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer additive powers of two."""
    return [APoTQuantizer]

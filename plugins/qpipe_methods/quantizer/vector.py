"""Code several neighbouring weights at once."""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import Tensor

from qpipe import QParams, Quantizer, QuantSpec, Range, RecipeError, Role, Samples, hookimpl

_ELEMENTS = 1 << 23  # distances held at a time


class VectorQuantizer(Quantizer[Samples]):
    """2^num_bits codewords of `dim` values, by k-means: num_bits / dim bits a weight, and the codebook.

    A codebook serves a block: granularity=layer keeps one a tensor. k-means starts from k-means++ (Arthur
    and Vassilvitskii, 2007), drawn alike in every block.

    Args:
        dim: d, values of a codeword, neighbours in a block, whose length it must divide.
        max_iterations: of Lloyd's algorithm, which stops when no codeword moves.
        starts: of which the best is kept.

    Source: Gong et al., "Compressing Deep Convolutional Networks using Vector Quantization", 2014, arXiv
    1412.6115, section 3.3; Stock et al., "And the Bit Goes Down", 2019, arXiv 1907.05686, section 3.
    Equation: min Σ_i ‖v_i - c_a(i)‖²; c_j = mean of the v_i with a(i) = j
    """

    name = "vector"
    roles = frozenset({Role.WEIGHT})
    stand_in = {Role.ACTIVATION: "uniform"}  # noqa: RUF012
    needs = Samples
    uses_range = False

    def __init__(self, dim: int = 4, max_iterations: int = 50, starts: int = 4) -> None:
        if dim < 1:
            raise RecipeError(f"quantizer.dim={dim} is too few; use 1 or more")
        self.dim = dim
        self.max_iterations = max_iterations
        self.starts = starts

    def check(self, spec: QuantSpec) -> None:
        """Refuse codebooks larger than what they code."""
        if spec.num_bits > 8:
            raise RecipeError(
                f"quantizer 'vector' keeps 2^num_bits codewords; "
                f"use {spec.role.value}.num_bits of 1 to 8, not {spec.num_bits}"
            )

    def fit(self, stats: Samples, range: Range | None, spec: QuantSpec) -> QParams:
        """Fit a codebook [B, 2^num_bits, dim]."""
        vectors = self._vectors(stats.blocks).double()
        fitted = [
            k_means(vectors, 2**spec.num_bits, self.max_iterations, seed)
            for seed in builtins.range(self.starts)
        ]
        errors = torch.stack([_error(vectors, codebook) for codebook in fitted])
        best, rows = errors.argmin(0), torch.arange(len(vectors), device=vectors.device)
        codebook = torch.stack(fitted)[best, rows].float()
        scale = torch.ones_like(codebook[:, :1, 0])
        return QParams(scale, torch.zeros_like(scale), {"codebook": codebook})

    def quantize(self, x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the index of the nearest codeword, [B, N / dim]."""
        return nearest(self._vectors(x), qparams.extra["codebook"].to(x.dtype)).to(x.dtype)

    def dequantize(self, codes: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
        """Return the values [B, N] of the codewords."""
        index = codes.long().unsqueeze(-1).expand(-1, -1, self.dim)
        return qparams.extra["codebook"].gather(1, index).flatten(1)

    def num_codes(self, num_values: int) -> int:
        """One for `dim` values; RecipeError where they do not split."""
        if num_values % self.dim:
            raise RecipeError(
                f"a block of {num_values} weights does not split into vectors of {self.dim}; "
                "use another quantizer.dim or granularity=layer, or leave the layer out by layers=[...]"
            )
        return num_values // self.dim

    def code_min(self, spec: QuantSpec) -> int:
        """Codes count the codewords from 0."""
        return 0

    def _vectors(self, blocks: Tensor) -> Tensor:
        """Return blocks [B, N] as vectors [B, N / dim, dim]."""
        return blocks.reshape(len(blocks), self.num_codes(blocks.shape[1]), self.dim)


def k_means(vectors: Tensor, k: int, max_iterations: int, seed: int = 0) -> Tensor:
    """Return the codewords [B, k, d] of vectors [B, M, d]; one that nothing is nearest to stays."""
    codebook = _start(vectors, k, seed)
    for _ in range(max_iterations):
        index = nearest(vectors, codebook)
        moved = _means(vectors, index, codebook)
        if torch.equal(moved, codebook):
            break
        codebook = moved
    return codebook


def _error(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the squared error of each block, [B]."""
    index = nearest(vectors, codebook).unsqueeze(-1).expand_as(vectors)
    return (vectors - codebook.gather(1, index)).square().sum((1, 2))


def _means(vectors: Tensor, index: Tensor, codebook: Tensor) -> Tensor:
    """Return the means of the vectors with each index, the codeword where there is none."""
    totals = torch.zeros_like(codebook).scatter_add_(1, index.unsqueeze(-1).expand_as(vectors), vectors)
    counts = torch.zeros_like(codebook[..., 0]).scatter_add_(1, index, torch.ones_like(vectors[..., 0]))
    counts = counts.unsqueeze(-1)
    return torch.where(counts > 0, totals / counts.clamp(min=1), codebook)


def _start(vectors: Tensor, k: int, seed: int) -> Tensor:
    """Draw k vectors, each with a probability in proportion to its squared distance from those before."""
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    rows = torch.arange(len(vectors), device=vectors.device)
    distance = torch.ones_like(vectors[..., 0])
    chosen = []
    for i, draw in enumerate(draws):
        mass = distance.cumsum(1)
        at = torch.searchsorted(mass, mass[:, -1:] * draw, right=True).clamp(max=mass.shape[1] - 1)
        chosen.append(vectors[rows, at[:, 0]])
        to_it = (vectors - chosen[-1].unsqueeze(1)).square().sum(-1)
        distance = torch.minimum(distance, to_it) if i else to_it
    return torch.stack(chosen, 1)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index [B, M] of the nearest codeword of each vector."""
    size = max(1, _ELEMENTS // (codebook.shape[0] * codebook.shape[1]))
    exact = "donot_use_mm_for_euclid_dist"
    parts = torch.split(vectors, size, 1)
    return torch.cat([torch.cdist(part, codebook, compute_mode=exact).argmin(-1) for part in parts], 1)


@hookimpl
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:
    """Offer codewords of several weights."""
    return [VectorQuantizer]

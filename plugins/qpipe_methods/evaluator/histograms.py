"""What the ranges keep and what they clip, of the tensors that lose most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Evaluator, Subject, hookimpl
from qpipe.nn import FakeQuant

_MOST_LEVELS = 256


class HistogramsEvaluator(Evaluator):
    """Count the values of the weights and activations with the worst signal-to-noise ratio of their own.

    Where blocks have ranges of their own, values are in units of their block's range, so that its upper end
    (its largest magnitude, where it lies below zero) is at 1. One batch is read.

    Args:
        num_tensors: kept, half of them weights where there are as many.
        num_bins: of each.
    """

    name = "histograms"

    def __init__(self, num_tensors: int = 12, num_bins: int = 64) -> None:
        self.num_tensors = num_tensors
        self.num_bins = num_bins

    @torch.inference_mode()
    def tables(self, subject: Subject) -> Mapping[str, Any]:
        """Return {'weights': [{'name', 'sqnr_db', 'low', 'high', 'counts', …}, …], 'activations': […]}."""
        if subject.variant != "simulated":
            return {}
        batch = next(iter(subject.batches))
        args, kwargs = subject.task.inputs(batch)
        seen: dict[FakeQuant, dict[str, Any]] = {}
        with _listening(subject.model, seen, self.num_bins):
            subject.model(*args, **kwargs)
        weights, activations = (
            sorted((row for q, row in seen.items() if (q.edge is None) is is_weight), key=_own_sqnr)
            for is_weight in (True, False)
        )
        half = max(self.num_tensors // 2, self.num_tensors - len(activations))
        kept = {"activations": activations[: self.num_tensors - half], "weights": weights[:half]}
        return {
            "title": "Values, ranges and levels",
            "about": "Of the tensors whose own rounding and clipping costs most, in one batch.",
            **{key: rows for key, rows in kept.items() if rows},
        }


def _own_sqnr(row: Mapping[str, Any]) -> float:
    return float(row["sqnr_db"])


@contextmanager
def _listening(model: nn.Module, seen: dict[FakeQuant, dict[str, Any]], num_bins: int) -> Iterator[None]:
    """Describe each static tensor at its first call."""

    def note(quantizer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        x = inputs[0]
        if isinstance(quantizer, FakeQuant) and quantizer not in seen and x.is_floating_point():
            seen[quantizer] = describe(quantizer, x.detach(), output.detach(), num_bins)

    active = [m for m in model.modules() if isinstance(m, FakeQuant) and m.enabled and _is_static(m)]
    handles = [m.register_forward_hook(note) for m in active]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_static(quantizer: FakeQuant) -> bool:
    return quantizer.calibrated and not quantizer.slot.spec.dynamic


def describe(quantizer: FakeQuant, x: Tensor, output: Tensor, num_bins: int) -> dict[str, Any]:
    """Return the histogram of x with its range, its levels and the share beyond them.

    Args:
        output: x as quantized.
    """
    granularity = quantizer.slot.granularity
    blocks, rounded = granularity.to_blocks(x).double(), granularity.to_blocks(output).double()
    low, high, step = (end.double() for end in _ends(quantizer, rounded))
    beyond = (blocks < low - step / 2) | (blocks > high + step / 2)
    several = len(blocks) > 1
    unit = torch.where(high > 0, high, low.abs().clamp(min=1e-30)) if several else torch.ones_like(high)
    shown, levels = blocks / unit, torch.unique(rounded / unit)
    clip = (low / unit).min(), (high / unit).max()
    first, last = min(shown.min(), clip[0]), max(shown.max(), clip[1])
    noise = (output - x).double().square().sum()
    return {
        "name": quantizer.name,
        "sqnr_db": float(10 * torch.log10(x.double().square().sum() / noise)) if noise > 0 else math.inf,
        "clipped_percent": 100 * float(beyond.double().mean()),
        **({"unit": "each block's range"} if several else {}),
        "num_bits": quantizer.slot.spec.num_bits,
        "low": float(first),
        "high": float(last),
        "clip_low": float(clip[0]),
        "clip_high": float(clip[1]),
        "counts": _counts(shown, float(first), float(last), num_bins),
        **({} if several or len(levels) > _MOST_LEVELS else {"num_levels": len(levels)}),
        **({} if several or len(levels) > 40 else {"levels": levels.tolist()}),
    }


def _counts(x: Tensor, low: float, high: float, num_bins: int) -> list[int]:
    width = (high - low) / num_bins or 1.0
    index = ((x.flatten() - low) / width).long().clamp(0, num_bins - 1)
    return list(torch.bincount(index, minlength=num_bins).tolist())


def _ends(quantizer: FakeQuant, rounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lowest and the highest level of each block and the step between levels there, [B, 1].

    Levels that are no grid are known by what came out: the largest gap next to an end stands for the step.
    """
    spec, qparams = quantizer.slot.spec, quantizer.qparams()
    if quantizer.slot.quantizer.is_affine(spec):
        scale, zero = qparams.scale, qparams.zero_point
        return (spec.quant_min - zero) * scale, (spec.quant_max - zero) * scale, scale
    low, high = rounded.amin(1, keepdim=True), rounded.amax(1, keepdim=True)
    below = torch.where(rounded < high, rounded, low).amax(1, keepdim=True)
    above = torch.where(rounded > low, rounded, high).amin(1, keepdim=True)
    return low, high, torch.maximum(high - below, above - low)


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the histograms."""
    return [HistogramsEvaluator]

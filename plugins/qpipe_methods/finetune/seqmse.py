"""Search each weight's range where the layer's outputs err least."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, QParams, RecipeError, Samples, hookimpl
from qpipe_methods.finetune._layerwise import LayerwiseStrategy
from qpipe_methods.quadratic import Goal, Levels, goal_of, set_bias
from qpipe_methods.reconstruction import Layer


class SequentialMSE(LayerwiseStrategy):
    """Choose among shrunk ranges by the error of the layer's outputs on the quantized model's inputs.

    Blocks of one output are searched apart: their errors are taken for uncorrelated.

    Args:
        steps: ranges tried.
        least: smallest share of the extremes tried.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: the sequential MSE of AIMET; the criterion of Nagel et al., 2021, arXiv 2106.08295, 3.1.
    Equation: argmin_s ‖(W - Q(W; s)) x‖²
    """

    name = "seqmse"

    def __init__(
        self, steps: int = 40, least: float = 0.3, num_samples: int = 128, memory_gb: float = 4.0
    ) -> None:
        super().__init__(num_samples, memory_gb)
        self.steps = steps
        self.least = least

    def improve(self, layer: Layer) -> None:
        """Set the qparams of least error, and the bias that goes with them."""
        goal, levels = goal_of(layer), Levels(layer)
        search_ranges(layer, levels, goal, torch.linspace(self.least, 1, self.steps).tolist())
        set_bias(layer, levels.round(goal.aim), goal)


def search_ranges(layer: Layer, levels: Levels, goal: Goal, ratios: list[float]) -> None:
    """Set each block's qparams to the best among the present ones and ratios of its extremes.

    Raises:
        RecipeError: the quantizer's levels do not follow a range.
    """
    slot, fake_quant = layer.fake_quant.slot, layer.fake_quant
    if not slot.quantizer.uses_range:
        raise RecipeError(f"quantizer '{slot.quantizer.name}' of '{layer.name}' has no range to search")
    stats = Samples(slot.granularity.to_blocks(layer.weight))
    block = levels.block
    own = _own_hessian(block[:, 0], goal)
    best, least = fake_quant.qparams(), _block_errors(layer, levels, own, block)
    for ratio in ratios:
        shrunk = stats.extremes().shrunk(torch.tensor([ratio]))
        qparams = slot.quantizer.fit(stats, shrunk, slot.spec)
        fake_quant.set_qparams(qparams)
        error = _block_errors(layer, levels, own, block)
        better = error < least
        least = torch.where(better, error, least)
        best = _chosen(better, qparams, best)
    fake_quant.set_qparams(best)


def _own_hessian(block: Tensor, goal: Goal) -> Tensor:
    """Return xx [G, K, K] without what couples the blocks [G, K] of one output."""
    return torch.where(block[:, :, None] == block[:, None], goal.xx, 0).float()


def _block_errors(layer: Layer, levels: Levels, own: Tensor, block: Tensor) -> Tensor:
    """Return the output error each block of the weight makes, [B, 1]."""
    weight = levels.rows(layer.weight)
    change = (levels.round(weight) - weight).to(own)
    errors = ((change @ own) * change).flatten()
    total = torch.zeros(levels.num_blocks, dtype=own.dtype, device=own.device)
    return total.index_add_(0, block.flatten(), errors)[:, None]


def _chosen(better: Tensor, new: QParams, old: QParams) -> QParams:
    extra = {name: torch.where(better, value, old.extra[name]) for name, value in new.extra.items()}
    return QParams(
        torch.where(better, new.scale, old.scale), torch.where(better, new.zero_point, old.zero_point), extra
    )


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer the sequential search."""
    return [SequentialMSE]

"""Move the outliers of activations into the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpipe import Recipe, Task, Transform, hookimpl
from qpipe.task import Batches
from qpipe_methods.transform._scaling import (
    Junction,
    check_kept,
    find_junctions,
    held,
    recorded,
    watch_inputs,
)


class SmoothQuant(Transform):
    """Divide each channel between a norm or layer and the linear layers that read it by its own scale.

    The function is kept. Pairs are found by recording: norms, layers before a product or ReLU, values of
    attention; where something else reads the tensor too, it stays as it is.

    Args:
        alpha: share of the difficulty that weights take over, 0 to 1; at 0.5 both maxima become equal.
        floor: least scale.

    Source: Xiao et al., 2022, arXiv 2211.10438, eq. 4.
    Equation: s_j = max|X_j|^α / max|W_j|^(1-α)
    """

    name = "smoothquant"

    def __init__(self, alpha: float = 0.5, floor: float = 1e-5) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share from 0 to 1, not {alpha}")
        self.alpha = alpha
        self.floor = floor

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Scale every junction by the largest activations of the calibration batches."""
        recording = recorded(model, batches, task)
        junctions = find_junctions(model, recording)
        seen = [torch.zeros(len(junction.index)) for junction in junctions]

        def see(number: int, x: Tensor) -> None:
            seen[number] = torch.maximum(seen[number], x.abs().amax(0).to(seen[number]))

        watch_inputs(model, batches, task, junctions, see)
        for junction, largest in zip(junctions, seen, strict=True):
            junction.divide(model, self.scale(junction.largest(largest), weights_largest(model, junction)))
        check_kept(model, recording, batches, task, self.name)

    def scale(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Return the scale of channels from the largest magnitudes of inputs and weights, [C] each.

        A channel that is dead on either side keeps its scale.
        """
        scale = inputs.pow(self.alpha) / weights.pow(1 - self.alpha)
        return torch.where((inputs > 0) & (weights > 0), scale.clamp(min=self.floor), 1)


def weights_largest(model: nn.Module, junction: Junction) -> Tensor:
    """Return the largest magnitude by which the readers weigh each row of the source."""
    weights = [held(model, path, "weight").abs().amax(0) for path in junction.readers]
    return junction.largest(torch.stack(weights).amax(0).float().cpu())


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer SmoothQuant."""
    return [SmoothQuant]

"""Set the least salient weights to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qpipe import DataError, RecipeError, Task, Transform, hookimpl
from qpipe_methods.pruning import PRUNED, check_budget, check_divides, largest_of_each, largest_share
from qpipe_methods.quadratic import damped, input_products

if TYPE_CHECKING:
    from qpipe import Recipe
    from qpipe.task import Batches

_SCOPES = {"magnitude": "layer", "snip": "model", "taylor": "model", "wanda": "row", "obs": "layer"}
_CHUNK = 2**24  # elements of the systems solved at once: 128 MiB


class Prune(Transform):
    """Prune the weights of linear and convolution layers once; the function changes.

    Zero is a level of every uniform quantizer and training keeps zeros, so pruned weights stay pruned. Two
    numbers n, m keep the n most salient of every m consecutive inputs instead of a share; a layer whose
    inputs m does not divide is left as it is.

    Args:
        saliency: 'magnitude' |w|; 'snip' |g w|, g the mean gradient of the loss; 'taylor' the mean of
            (g w)² over batches; 'wanda' |w| times the norm of its input, one a channel in convolutions;
            'obs' w² / [H⁻¹]_ii, the rise of the layer's output error, the weights that are kept making up
            for those that go; H the second moments of the layer's inputs in the float model.
        sparsity: share of the weights set to zero.
        scope: among which the share is taken: a 'row' (one output), a 'layer' or the whole 'model'; None:
            as the saliency's paper does (magnitude and obs layer, snip and taylor model, wanda row).
        n: kept of every m; None prunes by share.
        m: consecutive inputs that share a budget.
        damping: share of H's mean diagonal added to it; for obs.

    Source: Han et al., 2015, arXiv 1506.02626; SNIP: Lee et al., 2018, arXiv 1810.02340; Taylor:
    Molchanov et al., 2019, arXiv 1906.10771; Wanda: Sun et al., 2023, arXiv 2306.11695, eq. 1; OBS: Hassibi
    and Stork, "Second order derivatives for network pruning", 1992, eq. 5, layer by layer: Frantar and
    Alistarh, 2022, arXiv 2208.11580; n of m: Mishra et al., 2021, arXiv 2104.08378.
    Equation: w = 0 where |w|, |g w|, (g w)², |w| ‖x‖₂ or w² / [H⁻¹]_ii is among the smallest; obs, P being
    what goes: δw = -H⁻¹_:P ([H⁻¹]_PP)⁻¹ w_P
    """

    name = "prune"

    def __init__(
        self,
        saliency: Literal["magnitude", "snip", "taylor", "wanda", "obs"] = "magnitude",
        sparsity: float = 0.5,
        scope: Literal["row", "layer", "model"] | None = None,
        n: int | None = None,
        m: int = 4,
        damping: float = 0.01,
    ) -> None:
        if saliency not in _SCOPES:
            raise ValueError(f"saliency is one of {', '.join(_SCOPES)}, not {saliency!r}")
        if scope not in ("row", "layer", "model", None):
            raise ValueError(f"scope is row, layer, model or null, not {scope!r}")
        if scope and n is not None:
            raise RecipeError(f"transform.prune: n={n} of m={m} has no scope '{scope}'; leave one out")
        if damping <= 0:
            raise RecipeError(f"transform.prune.damping={damping} leaves H singular; use more than 0")
        check_budget("transform.prune", sparsity, n, m)
        self.saliency = saliency
        self.sparsity = sparsity
        self.scope = scope or _SCOPES[saliency]
        self.n = n
        self.m = m
        self.damping = damping

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Prune in place; magnitude reads no data.

        Raises:
            RecipeError: the saliency needs a loss and there is none, or m divides no layer.
            DataError: a gradient is not finite.
        """
        layers = {name: m for name, m in model.named_modules() if isinstance(m, PRUNED)}
        if not layers:
            return
        if self.n is not None:
            check_divides("transform.prune", [layer.weight for layer in layers.values()], self.m)
        if self.saliency == "obs":
            hessians = self.hessians(model, [*layers.values()], batches, task)
            scores = [removal_loss(layer, h) for layer, h in zip(layers.values(), hessians, strict=True)]
            for layer, mask, h in zip(layers.values(), self.masks(scores), hessians, strict=True):
                layer.weight.data.copy_(compensated(layer.weight.detach(), mask, h))
            return
        scores = self.scores(model, layers, batches, task)
        for layer, mask in zip(layers.values(), self.masks(scores), strict=True):
            layer.weight.data.mul_(mask)

    def hessians(self, model: nn.Module, layers: list[Any], batches: Batches, task: Task) -> list[Tensor]:
        """Return the sum of x x' over each layer's inputs, damped; [G, K, K] for G groups of channels."""
        sums = collected(model, layers, batches, task, input_products)
        return [
            damped(sums[layer], self.damping)
            if layer in sums
            else torch.eye(layer.weight[0].numel(), dtype=torch.float64).repeat(_groups(layer), 1, 1)
            for layer in layers
        ]

    def scores(self, model: nn.Module, layers: dict[str, Any], batches: Batches, task: Task) -> list[Tensor]:
        """Return how much each weight matters, shaped like the layers' weights; obs: see removal_loss."""
        weights = [layer.weight.detach() for layer in layers.values()]
        if self.saliency == "magnitude":
            return [weight.abs() for weight in weights]
        if self.saliency == "wanda":
            norms = input_norms(model, list(layers.values()), batches, task)
            return [w.abs() * norm for w, norm in zip(weights, norms, strict=True)]
        power = 2 if self.saliency == "taylor" else 1
        scores = [torch.zeros_like(weight) for weight in weights]
        for gradients in loss_gradients(
            model, [f"{name}.weight".lstrip(".") for name in layers], batches, task
        ):
            for score, weight, gradient in zip(scores, weights, gradients, strict=True):
                score += (gradient * weight) ** power
        return [score.abs() for score in scores]

    def masks(self, scores: list[Tensor]) -> list[Tensor]:
        """Return 1 where weights [O, I, *] of these scores are kept, 0 elsewhere."""
        if self.n is not None:
            return [largest_of_each(score, self.n, self.m) for score in scores]
        kept = 1 - self.sparsity
        if self.scope == "row":
            return [largest_share(score.flatten(1), kept).view_as(score) for score in scores]
        if self.scope == "layer":
            return [largest_share(score.flatten(), kept).view_as(score) for score in scores]
        mask = largest_share(torch.cat([score.flatten() for score in scores]), kept)
        parts = torch.split(mask, [score.numel() for score in scores])
        return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def loss_gradients(
    model: nn.Module, names: list[str], batches: Batches, task: Task
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, batch by batch, the gradient of the loss by these parameters.

    Raises:
        RecipeError: the task has no loss.
        DataError: a gradient is not finite.
    """
    if type(task).loss is Task.loss:
        raise RecipeError(
            f"transform.prune needs a loss for its gradients, and {type(task).__name__} has none; "
            "give a task that has one, or use saliency=wanda"
        )
    free = {name: model.get_parameter(name).detach().requires_grad_() for name in names}
    for batch in batches:
        args, kwargs = task.inputs(batch)
        with torch.enable_grad():
            loss = task.loss(torch.func.functional_call(model, free, args, kwargs), batch)
        gradients = torch.autograd.grad(loss, [*free.values()], allow_unused=True, materialize_grads=True)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise DataError("transform.prune met a gradient that is not finite; check the calibration data")
        yield gradients


def removal_loss(layer: Any, hessian: Tensor) -> Tensor:  # noqa: ANN401  # linear or convolution
    """Return by how much removing each weight raises half the layer's squared output error."""
    rows = layer.weight.detach().reshape(len(hessian), -1, hessian.shape[-1]).to(hessian)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal(dim1=1, dim2=2)
    loss: Tensor = 0.5 * rows.square() / inverse.unsqueeze(1)
    return loss.view_as(layer.weight).to(layer.weight)


def compensated(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Return weight [O, I, *] with zeros where mask has them and, elsewhere, what then errs least.

    Minimises (w - v)' H (w - v) over v with these zeros, H [G, K, K]: one system a row, many at once.
    """
    groups, size = hessian.shape[:2]
    rows = weight.reshape(groups, -1, size).to(hessian)
    kept = mask.reshape(rows.shape).to(hessian)
    wanted = kept * (rows @ hessian)
    step = max(1, _CHUNK // (groups * size**2))
    solved = [
        _solved(hessian, some, right)
        for some, right in zip(torch.split(kept, step, 1), torch.split(wanted, step, 1), strict=True)
    ]
    return torch.cat(solved, 1).view_as(weight).to(weight)


def _solved(hessian: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
    system = hessian.unsqueeze(1) * kept.unsqueeze(-1) * kept.unsqueeze(-2) + torch.diag_embed(1 - kept)
    solution: Tensor = torch.cholesky_solve(wanted.unsqueeze(-1), torch.linalg.cholesky(system))
    return solution.squeeze(-1) * kept


@torch.no_grad()
def collected(
    model: nn.Module,
    layers: list[Any],
    batches: Batches,
    task: Task,
    of: Callable[[Any, Tensor], Tensor],
) -> dict[nn.Module, Tensor]:
    """Return what a function of each layer and its input sums to over all batches; of layers called."""
    sums: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[layer] = sums.get(layer, 0) + of(layer, args[0])

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        for batch in batches:
            args, kwargs = task.inputs(batch)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def input_norms(model: nn.Module, layers: list[Any], batches: Batches, task: Task) -> list[Tensor]:
    """Return ‖x‖₂ of each input over all batches, to multiply each weight: [O or 1, I, *1]."""
    squares = collected(model, layers, batches, task, _squares)
    return [
        _spread(squares[layer].sqrt(), layer) if layer in squares else layer.weight.new_ones(())
        for layer in layers
    ]


def _squares(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401  # linear or convolution
    if not isinstance(layer, nn.Linear):
        x = x.movedim(-layer.weight.dim() + 1, -1)
    return x.flatten(0, -2).square().sum(0)


def _groups(layer: Any) -> int:  # noqa: ANN401  # linear or convolution
    return int(getattr(layer, "groups", 1))


def _spread(norm: Tensor, layer: Any) -> Tensor:  # noqa: ANN401  # linear or convolution
    """Shape the norms of all inputs [I] like the weights that read them."""
    weight = layer.weight
    rows = norm.view(-1, weight.shape[1])  # one for each group of a convolution
    rows = rows.repeat_interleave(weight.shape[0] // len(rows), 0)
    return rows.view(*rows.shape, *[1] * (weight.dim() - 2))


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer pruning."""
    return [Prune]

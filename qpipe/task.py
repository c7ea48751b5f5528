"""How a batch feeds a model, what is lost, what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torchmetrics import Metric

Batches = Iterable[Any]  # re-iterable: a DataLoader, or a list of batches


class Task:
    """The least a run needs to know; subclass it for a loss and metrics of your own.

    Args:
        class_dim: dimension of the output that ranges over classes, or None when arg-max means nothing.
    """

    def __init__(self, class_dim: int | None = -1) -> None:
        self.class_dim = class_dim

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401  # a user's batch
        """Return (args, kwargs) of the model's forward: x, (x, target) or a dict without its 'labels'."""
        if isinstance(batch, Mapping):
            return (), {key: value for key, value in batch.items() if key not in ("labels", "label")}
        if isinstance(batch, (tuple, list)):
            return (batch[0],), {}
        return (batch,), {}

    def compared(self, output: Any) -> Tensor:  # noqa: ANN401
        """Return the tensor by which two variants are compared: the first floating-point one."""
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf
        raise TypeError(f"the model's output holds no floating-point tensor: {type(output).__name__}")

    def loss(self, output: Any, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the training loss."""
        raise NotImplementedError(f"{type(self).__name__} has no loss; give a task that has one")

    def metrics(self) -> Mapping[str, Metric]:
        """Return fresh metrics, named with their unit, updated with update(output, batch)."""
        return {}

    def scores(self, output: Any, batch: Any) -> Mapping[str, Tensor]:  # noqa: ANN401
        """Return the metrics sample by sample where they are means over samples, [n], by the same names."""
        return {}

    def notices(self, figures: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
        """Return what the user should know about the figures, by variant ('fp32', ...) and metric."""
        return ()

"""Learn from the float model as well as from the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.errors import RecipeError
from qpipe.task import Task


@dataclass(frozen=True)
class Distillation:
    """How much of the loss comes from the float model.

    Args:
        weight: share of soft targets in the loss, 0 to 1; at 1 no label is read.
        temperature: of the soft targets.
        features: weight of the squared error between the outputs of inner modules, relative to theirs.
        match: glob of the modules compared.

    Source: Hinton et al., 2015, arXiv 1503.02531 (soft targets); Romero et al., 2014, arXiv 1412.6550.
    """

    weight: float = 0.0
    temperature: float = 4.0
    features: float = 0.0
    match: str = "*"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"distill.weight={self.weight} lies outside 0 to 1")
        if self.temperature <= 0:
            raise ValueError(f"distill.temperature={self.temperature} is not positive")

    def __bool__(self) -> bool:
        return self.weight > 0 or self.features > 0

    def loss(
        self,
        call: Callable[..., Any],
        student: nn.Module,
        teacher: nn.Module,
        task: Task,
        batch: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return (1 - weight) task loss + weight soft-target loss + features feature loss.

        Args:
            call: runs the student, compiled or not.
        """
        args, kwargs = task.inputs(batch)
        if not self:
            return task.loss(call(*args, **kwargs), batch)
        with _outputs(student, self._pattern) as ours, _outputs(teacher, self._pattern) as theirs:
            output = call(*args, **kwargs)
            with torch.no_grad():
                soft = teacher(*args, **kwargs)
        loss = self.features * feature_loss(ours, theirs) if self.features else 0.0
        if self.weight:
            target = task.compared(soft)
            loss = loss + self.weight * soft_target_loss(
                task.compared(output), target, self.temperature, task.class_dim
            )
        if self.weight < 1:
            loss = loss + (1 - self.weight) * task.loss(output, batch)
        return torch.as_tensor(loss)

    @property
    def _pattern(self) -> str | None:
        return self.match if self.features else None


def soft_target_loss(output: Tensor, target: Tensor, temperature: float, class_dim: int | None) -> Tensor:
    """Return T^2 KL(softmax(target / T) || softmax(output / T)), the mean over all but classes.

    Without classes it is the mean squared error.
    """
    if class_dim is None:
        return F.mse_loss(output, target)
    student = (output / temperature).log_softmax(class_dim)
    teacher = (target / temperature).log_softmax(class_dim)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(class_dim).mean()


def feature_loss(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Return the mean over modules of ||ours - theirs||^2 / ||theirs||^2."""
    names = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    if not names:
        raise RecipeError("distill.match names no module of the model that returns a tensor")
    errors = [
        (ours[name] - theirs[name]).square().sum() / theirs[name].square().sum().clamp(min=1e-12)
        for name in names
    ]
    return torch.stack(errors).mean()


@contextmanager
def _outputs(model: nn.Module, pattern: str | None) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors that modules of that name return."""
    found: dict[str, Tensor] = {}

    def listen(name: str) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            if isinstance(output, Tensor) and output.is_floating_point():
                found[name] = output

        return hook

    chosen = [] if pattern is None else [(n, m) for n, m in model.named_modules() if fnmatchcase(n, pattern)]
    handles = [module.register_forward_hook(listen(name)) for name, module in chosen if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

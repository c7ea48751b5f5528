"""The arguments of one forward, and the batch in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe.errors import DataError, RecipeError, cause

Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs


def two_samples(call: Call) -> Call:
    """Cut a call's tensors to two samples, doubling a single one: torch.export takes 1 for a constant."""
    size = batch_size(call)

    def cut(leaf: Any) -> Any:  # noqa: ANN401
        if not batched(leaf, size):
            return leaf
        return torch.cat([leaf, leaf])[:2] if size == 1 else leaf[:2].clone()

    cut_call: Call = pytree.tree_map(cut, call)
    return cut_call


def batch_size(call: Call) -> int:
    """Return the first dimension of a call's first tensor that has one."""
    return next(
        (len(leaf) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()), 1
    )


def batched(leaf: Any, size: int) -> bool:  # noqa: ANN401
    """Say whether an argument has the batch as its first dimension."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size


def some_samples(call: Call, count: int) -> Call:
    """Cut a call's tensors to count samples."""
    size = batch_size(call)
    cut: Call = pytree.tree_map(lambda leaf: leaf[:count].clone() if batched(leaf, size) else leaf, call)
    return cut


def repeated(call: Call, count: int) -> Call:
    """Return a call of count samples, the same ones over and over where there are fewer."""
    size = batch_size(call)
    rows = torch.arange(count) % size
    samples: Call = pytree.tree_map(lambda leaf: leaf[rows] if batched(leaf, size) else leaf, call)
    return samples


def moved(call: Call, device: torch.device | str) -> Call:
    """Return the call with its tensors on device."""
    on_device: Call = pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, call
    )
    return on_device


def tensors(call: Call) -> list[Tensor]:
    """Return the tensors among a call's arguments, in the order of the file's inputs."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def given(
    call: Call, keywords: Iterable[str], shapes: Mapping[str, Sequence[int | str | None]]
) -> list[Tensor]:
    """Return the tensors of a call that a file takes, the positional ones first.

    Args:
        keywords: in the order of the file's inputs.
        shapes: of the inputs by name; what is no number may be any size.

    Raises:
        DataError: one is missing, too many, or of another shape.
    """
    args, kwargs = call
    if missing := [key for key in keywords if key not in kwargs]:
        raise DataError(f"the file takes '{missing[0]}', which this call lacks; pass it by name")
    inputs = tensors((args, {key: kwargs[key] for key in keywords}))
    if len(inputs) != len(shapes):
        raise DataError(f"the file takes {len(shapes)} tensors, not {len(inputs)}")
    for (name, shape), x in zip(shapes.items(), inputs, strict=True):
        sizes = zip(shape, x.shape, strict=False)
        if len(shape) != x.dim() or not all(size == n or not isinstance(size, int) for size, n in sizes):
            wanted = ", ".join(map(str, shape))
            raise DataError(f"the file takes '{name}' of shape [{wanted}], not {[*x.shape]}")
    return inputs


@dataclass(frozen=True)
class Index:
    """Stands for the n-th tensor of what a model returns."""

    at: int


def indexed(output: Any) -> Any:  # noqa: ANN401  # whatever the model returns
    """Replace the tensors of a model's output by their indices."""
    count = iter(range(len(pytree.tree_leaves(output))))
    return pytree.tree_map_only(Tensor, lambda _: Index(next(count)), output)


def filled(output: Any, tensors: list[Tensor]) -> Any:  # noqa: ANN401
    """Undo indexed, with other tensors."""
    return pytree.tree_map_only(Index, lambda index: tensors[index.at], output)


def needed(output: Any) -> int:  # noqa: ANN401
    """Return how many of a file's outputs make what a model returns, as indexed gave it."""
    indices = [leaf.at for leaf in pytree.tree_leaves(output) if isinstance(leaf, Index)]
    return max(indices, default=-1) + 1


def described(output: Any) -> Any:  # noqa: ANN401
    """Return what indexed gave as plain data, for a file."""
    if isinstance(output, Index):
        return output.at
    if isinstance(output, Mapping):
        return {str(key): described(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [described(value) for value in output]
    return None


def rebuilt(plain: Any) -> Any:  # noqa: ANN401
    """Undo described, as far as plain data goes: records are dictionaries, sequences tuples."""
    if isinstance(plain, dict):
        return {key: rebuilt(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return tuple(rebuilt(value) for value in plain)
    return Index(plain) if isinstance(plain, int) else None


def exported(model: nn.Module, call: Call) -> torch.export.ExportedProgram:
    """Return the graph of model, called so, for any batch size.

    Raises:
        RecipeError: the model's forward fixes the batch size, or depends on values.
    """
    call = two_samples(call)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, *call, dynamic_shapes=dynamic_batch(call), strict=False)
        except Exception as error:
            raise RecipeError(
                f"the model has no graph for every batch size: {cause(error)}; leave out exporters that need "
                "one, or take sizes from x.shape in forward"
            ) from error


def dynamic_batch(call: Call) -> Any:  # noqa: ANN401  # a ShapesCollection, which torch leaves untyped
    """Say to torch.export which dimensions vary: the batch, and of token sequences the length."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    size = batch_size(call)
    for leaf in pytree.tree_leaves(call):
        if batched(leaf, size):
            shapes[leaf] = {0: torch.export.Dim.DYNAMIC}
            if not leaf.is_floating_point() and leaf.dim() == 2:  # token ids and their masks
                shapes[leaf][1] = torch.export.Dim.AUTO
    return shapes

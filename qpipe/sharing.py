"""Copies of a model that share its memory until one of them is written to."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn


def shared_copy(model: nn.Module, same: Collection[nn.Parameter] = ()) -> nn.Module:
    """Return a deep copy whose parameters take memory of their own once they, or the originals, change.

    Args:
        same: parameters that are not copied but the very same.
    """
    twins = {
        id(p): nn.Parameter(shared(p), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter
    }
    return copy.deepcopy(model, twins | {id(p): p for p in same})


def shared(x: Tensor) -> Tensor:
    """Return a detached copy of x, made when either is first changed in place.

    Memory that is not torch's own (NumPy's, a file's, another process's) is copied at once.
    """
    try:
        twin: Tensor = torch._lazy_clone(x.detach())
    except RuntimeError:
        twin = x.detach().clone()
    return twin


def is_shared(x: Tensor) -> bool:
    """Whether x was shared and neither it nor a copy was written to since."""
    cow: bool = torch._C._is_cow_tensor(x)  # type: ignore[attr-defined]
    return cow

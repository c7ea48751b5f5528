"""What torch's functions are called, whatever spelling reached them: `a += b`, `torch.add`, `Tensor.add_`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

_ALIASES = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "bmm": "matmul",
    "mm": "matmul",
    "rmatmul": "matmul",
    "clip": "clamp",
    "hardtanh": "clamp",
    "feature_dropout": "dropout",
    "alpha_dropout": "dropout",
    "dropout1d": "dropout",
    "dropout2d": "dropout",
    "dropout3d": "dropout",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "T": "transpose",
    "mT": "transpose",
}
_NAMESPACES = (torch.Tensor, torch, F, torch._C._nn, torch._C._VariableFunctions)


def op_name(func: Any) -> str:  # noqa: ANN401  # anything callable a mode is handed
    """Return the canonical name of a torch function; of an attribute's getter, the attribute's."""
    return _NAMES.get(func) or _canonical(func)


def is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:  # noqa: ANN401
    """Whether a call changes its first argument and returns it."""
    return _IN_PLACE.get(func, False) or bool(kwargs.get("inplace"))


@functools.cache
def seen_through(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a composite function of torch.nn.functional whose inner calls a mode can see.

    Such a function hands itself to an active mode as one call, so entering the mode again would not end.
    """
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    return types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__)


def _canonical(func: Any) -> str:  # noqa: ANN401
    name = str(getattr(func, "__name__", type(func).__name__))
    if name in ("__get__", "__set__"):
        name = str(getattr(func.__self__, "__name__", name))
    name = name.split(".")[0].strip("_")
    return _ALIASES.get(name, name)


def _known() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for namespace in _NAMESPACES:
        for name in dir(namespace):
            func = getattr(namespace, name, None)
            if isinstance(func, _FUNCTIONS):
                names[func] = _canonical(func)
    return names


_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
_NAMES = _known()
REBINDING = {  # in place, but Python goes on with what is returned
    torch.Tensor.__iadd__: torch.Tensor.__add__,
    torch.Tensor.__isub__: torch.Tensor.__sub__,
    torch.Tensor.__imul__: torch.Tensor.__mul__,
    torch.Tensor.__itruediv__: torch.Tensor.__truediv__,
}
_IN_PLACE = {  # dictionaries, not sets: dynamo looks functions up in no other container
    func: True for func in _NAMES if func.__name__.endswith("_") and not func.__name__.startswith("_")
} | dict.fromkeys(REBINDING, True)

"""When freed memory goes back to the system: glibc's two thresholds, set for a while."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

_MIB = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, malloc.h
_MOST = 2**31 - 1  # mallopt takes an int


_LARGE = 2**28  # bytes of parameters from which memory counts for more than time


def reusing(model: nn.Module) -> AbstractContextManager[None]:
    """Keep what is freed for the next layer's output, however large, unless the model itself is large.

    glibc otherwise asks the system for each block of more than 32 MiB, and touching its pages anew takes as
    long as a convolution.
    """
    return nullcontext() if _is_large(model) else _thresholds(mmap=_MOST, trim=_MOST)


def frugal(model: nn.Module) -> AbstractContextManager[None]:
    """Give what is freed back to the system, all but small blocks at once, where the model is large.

    glibc otherwise keeps freed blocks of up to 32 MiB, an arena for each thread, in pieces that seldom fit
    again.
    """
    return _thresholds(mmap=_MIB // 8, trim=64 * _MIB) if _is_large(model) else nullcontext()


def release(model: nn.Module) -> None:
    """Give back what stays of freed small blocks, and of MKL's copies of matrices, where the model is large.

    MKL keeps a buffer for each thread that multiplied matrices.
    """
    libc = _glibc() if _is_large(model) else None
    if libc is not None:
        if hasattr(mkl := _libtorch(), "mkl_serv_free_buffers"):
            mkl.mkl_serv_free_buffers()
        libc.malloc_trim(0)


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.nbytes for parameter in model.parameters()) > _LARGE


@contextmanager
def _thresholds(mmap: int, trim: int) -> Iterator[None]:
    """Set them; where there is no glibc, or the user set them, do nothing."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, mmap)
    libc.mallopt(_TRIM_THRESHOLD, trim)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)  # where it ends by itself in a process that runs for long
        libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:  # noqa: ANN401
    """Return the C library where it has glibc's knobs and nobody turned them, else None."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & {*os.environ}
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") and not chosen else None


@cache
def _libtorch() -> Any:  # noqa: ANN401
    """Return the library that holds MKL where torch was built with it."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

"""Keep a long walk through a large model within memory: freed blocks go back, rewritten weights to disk."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qpipe import is_shared

log = logging.getLogger("qpipe")
_MIB = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, malloc.h


@contextmanager
def frugal() -> Iterator[None]:
    """Give what is freed back to the system, blocks of a MiB and more at once.

    glibc keeps freed blocks of up to 32 MiB, an arena for each thread, in pieces that seldom fit again. Where
    there is no glibc, or the user set its thresholds, nothing is done.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, _MIB)
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


def to_disk(x: Tensor) -> None:
    """Move a tensor's memory into a file that has no name; its pages are read when they are used.

    The system keeps of the file what there is room for. What is small, shared with the float model, or not on
    the CPU stays.
    """
    if x.device.type != "cpu" or x.nbytes < _MIB or is_shared(x):
        return
    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(x.nbytes)
            pages = mmap.mmap(file.fileno(), x.nbytes)
    except OSError as error:
        log.warning("weights that are rewritten stay in memory: %s", error)
        return
    with torch.no_grad():
        on_disk = torch.frombuffer(pages, dtype=x.dtype).view(x.shape)
        x.data = on_disk.copy_(x)
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)

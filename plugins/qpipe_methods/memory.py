"""Keep a long walk through a large model within memory: rewritten weights go to disk."""

from __future__ import annotations

import logging
import mmap
import tempfile

import torch
from torch import Tensor

from qpipe import is_shared

log = logging.getLogger("qpipe")
_LEAST = 2**16  # bytes that are worth a file of their own


def to_disk(x: Tensor) -> None:
    """Move a tensor's memory into a file that has no name; its pages are read when they are used.

    The system keeps of the file what there is room for. What is small, shared with the float model, or not on
    the CPU stays.
    """
    if x.device.type != "cpu" or x.nbytes < _LEAST or is_shared(x):
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

"""What Lightning says that no user of qpipe can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Noise that no user of qpipe can act on: (category, beginning of the message).
_KNOWN_NOISE: tuple[tuple[type[Warning], str], ...] = (
    # Lightning 2.6 asks torch 2.13's pytree in the old way
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # calibration has few batches on purpose; loading is the user's business
    (UserWarning, r"The '\w+' does not have many workers"),
    # an iterable of batches without a length is welcome
    (UserWarning, r"Total length of `\w+` across ranks is zero"),
    # training without a validation set is the user's choice
    (UserWarning, r"You defined a `validation_step` but have no `val_dataloader`"),
    (UserWarning, r"You passed in a `val_dataloader` but have no `validation_step`"),
    # frozen batch norm
    (UserWarning, r"Found \d+ module\(s\) in eval mode at the start of training"),
    # a small training set has few steps to log
    (UserWarning, r"The number of training batches \(\d+\) is smaller than the logging interval"),
    # a pass without training has no optimizer and needs none
    (UserWarning, r"`.*configure_optimizers`"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out known noise, and which devices Lightning found each time it looks."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    try:
        lightning.setLevel(max(level, logging.WARNING))
        with warnings.catch_warnings():
            for category, message in _KNOWN_NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        lightning.setLevel(level)

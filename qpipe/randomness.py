"""The state of every random generator, so that what is skipped leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> Any:  # noqa: ANN401
    """Return the state of Python's, NumPy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: Any) -> None:  # noqa: ANN401
    """Go back to what random_state() returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)

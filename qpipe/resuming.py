"""Training that was interrupted goes on where it was saved last."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import distributed

from qpipe.errors import DataError, RecipeError

log = logging.getLogger("qpipe")
_FILE = "last.ckpt"


@dataclass(frozen=True)
class Saved:
    """Where a training is saved, and what of it is there already.

    Args:
        file: a checkpoint; None: nothing is saved.
        saving: writes it after each epoch; None where the user keeps checkpoints himself.
    """

    file: Path | None
    saving: Saving | None

    @classmethod
    def of(cls, resume: str | None, about: str) -> Saved:
        """Return what `resume` says: a folder of ours, or a file of the user's.

        Args:
            about: what is trained; another training is not gone on with.
        """
        if resume is None:
            return cls(None, None)
        path = Path(resume)
        if path.suffix == ".ckpt" or path.is_file():
            return cls(path, None)
        return cls(path / _FILE, Saving(path / _FILE, about))

    def found(self, loop: LightningModule) -> str | None:
        """Return the checkpoint to go on from, None to begin.

        Raises:
            DataError: it is damaged.
            RecipeError: it is of another training.
        """
        if self.file is None or not self.file.exists():
            return None
        checkpoint = _read(self.file)
        about = checkpoint.get("callbacks", {}).get(Saving.__qualname__, {}).get("about")
        theirs, ours = (_shapes(state) for state in (checkpoint["state_dict"], loop.state_dict()))
        if theirs != ours or (self.saving is not None and about != self.saving.about):
            raise RecipeError(
                f"{self.file} was saved by a training with other words; name another folder by resume=…, "
                "or delete it"
            )
        log.info("going on from %s, %d epochs done", self.file, checkpoint["epoch"] + 1)
        return str(self.file)


def _read(file: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["epoch"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{file} is no checkpoint one can go on from ({lines[0]}); delete it") from None
    return checkpoint


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}


class Saving(Checkpoint):
    """Save a training after each epoch but the last, random generators and all, so that it goes on alike.

    Args:
        file: written aside, then renamed.
        about: kept with it.
    """

    def __init__(self, file: Path, about: str) -> None:
        self.file = file
        self.about = about
        self.random: list[str] = []  # one a process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw on from where the saved training stood; its next epoch began with a new iterator."""
        if trainer.global_rank < len(self.random):
            _set_random(self.random[trainer.global_rank])
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # the loaders' order is drawn

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, but for the last epoch: Lightning does not end what has ended again."""
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            return
        self.random = [_random()]
        if trainer.world_size > 1:
            self.random = [""] * trainer.world_size
            distributed.all_gather_object(self.random, _random())
        partial = self.file.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.file)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept beside the model."""
        return {"about": self.about, "random": self.random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was kept."""
        self.random = state_dict["random"]

    @property
    def state_key(self) -> str:
        """Return the name its state is kept by."""
        return type(self).__qualname__


def _random() -> str:
    """Return the state of every generator as text: a checkpoint is read without trusting it."""
    name, keys, *rest = np.random.get_state()  # the one that datasets draw from
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return json.dumps(
        {
            "torch": torch.get_rng_state().tolist(),
            "cuda": [state.tolist() for state in devices],
            "numpy": [name, np.asarray(keys).tolist(), *rest],
            "python": random.getstate(),
        }
    )


def _set_random(text: str) -> None:
    state = json.loads(text)
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))

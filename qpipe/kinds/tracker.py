"""Where a run is recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qpipe.errors import RecipeError

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from qpipe.types import Report


class Tracker(ABC):
    """Record one run; never the reason it fails."""

    name: ClassVar[str]

    def start_sweep(self, config: Mapping[str, Any], earlier: str | None = None) -> str | None:
        """Open a parent for a sweep and return its id, which start() of each job receives.

        Args:
            earlier: the id that this sweep had when it was interrupted: go on with it.
        """
        return None

    def finish_sweep(self, parent: str, status: str, folder: Path) -> str | None:
        """Record folder/sweep.*, the sweep's own files, close it: 'finished', 'failed' or 'killed'.

        Return where to look, as finish() does.
        """

    @abstractmethod
    def start(self, config: Mapping[str, Any], parent: str | None = None) -> Logger | bool:
        """Open the run; the returned Lightning logger puts curves into it (False: none)."""

    @abstractmethod
    def finish(self, report: Report | None, folder: Path | None, status: str) -> str | None:
        """Record the report, close the run as 'finished', 'failed' or 'killed', return where to look."""

    def sync(self, folder: Path, parent: str | None = None) -> str:
        """Record a finished run's folder that start() and finish() never reached, once; say where it is.

        Args:
            parent: of the sweep it belongs to.

        Raises:
            RecipeError: this tracker cannot.
        """
        raise RecipeError(f"tracker '{self.name}' cannot record a folder afterwards; run the job again")

    def fetch(self, run: str, names: Sequence[str], folder: Path) -> None:
        """Write those of a recorded run's files that are named, and there, into a folder.

        Raises:
            RecipeError: there is no such run, or this tracker cannot.
        """
        raise RecipeError(f"tracker '{self.name}' cannot fetch runs; give the run's folder")

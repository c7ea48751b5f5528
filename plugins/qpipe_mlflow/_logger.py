"""Curves of a Lightning trainer, into the run that is already open."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import MLFlowLogger

log = logging.getLogger("qpipe")


class RunLogger(MLFlowLogger):
    """Log metrics to a run that the tracker closes; a store that is gone stops no training."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics while the store answers."""
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # whatever a store raises
            self.lost = True
            log.warning("curves are no longer recorded: %s", error)

    def log_hyperparams(self, params: Any) -> None:  # noqa: ANN401
        """Leave parameters out: the tracker logged the whole configuration."""

    def finalize(self, status: str = "success") -> None:
        """Leave the run open: a trainer that ends is not the end of the run."""

"""Curves of a Lightning trainer, into the run that is already open."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import DummyLogger, Logger

from qpipe_mlflow._record import log_points, metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from qpipe_mlflow._record import Point


class Curves(Logger):
    """Log metrics to a run that the tracker closes; what a store does not take is kept for later.

    Lightning's own MLFlowLogger asks the store for its run before it trains: one that stalls there ends
    the training.

    Args:
        client, run_id: of the run, None where the store did not answer.
        lost: is told what the store raised.
    """

    def __init__(
        self, client: MlflowClient | None, run_id: str | None, lost: Callable[[Exception], None]
    ) -> None:
        super().__init__()
        self.client = client
        self.run_id = run_id
        self.lost = lost
        self.kept: list[Point] = []

    @property
    def name(self) -> str:
        """Return the word used in yaml."""
        return "mlflow"

    @property
    def version(self) -> str | None:
        """Return the run's id."""
        return self.run_id

    @property
    def experiment(self) -> Any:  # noqa: ANN401  # a client, or what swallows every call
        """Return the client, for modules that log something of their own."""
        return self.client or DummyLogger().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics while the store answers."""
        now = int(time.time() * 1000)
        self.kept += [(metric_name(name), float(value), now, step or 0) for name, value in metrics.items()]
        if self.client is None or self.run_id is None:
            return
        try:
            log_points(self.client, self.run_id, self.kept)
            self.kept.clear()
        except Exception as error:  # whatever a store raises
            self.client = None
            self.lost(error)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Leave parameters out: the tracker logged the whole configuration."""

"""One pass of batches through a model, driven by Lightning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn

from qpipe.noise import quiet
from qpipe.stages.data import Shard
from qpipe.task import Batches, Task

log = logging.getLogger("qpipe")


class Forward(LightningModule):
    """Run any module on the batches of a task."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def predict_step(self, batch: Any, batch_idx: int) -> Any:  # noqa: ANN401
        """Return the model's output."""
        args, kwargs = self.task.inputs(batch)
        return self.model(*args, **kwargs)


class Listener(Callback):
    """Hear every output of a pass, and its start and end, when all processes are there."""

    def __init__(
        self,
        each: Callable[[Any, Any, int], None] | None = None,
        at_start: Callable[[], None] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self.each = each  # (output, batch, index)
        self.at_start = at_start
        self.at_end = at_end

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the start on."""
        if self.at_start:
            self.at_start()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pass the output on."""
        if self.each:
            self.each(outputs, batch, batch_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the end on."""
        if self.at_end:
            self.at_end()


class OwnStep(Callback):
    """Hear the outputs of a LightningModule that runs its own test or validation step."""

    def __init__(self, task: Task, each: Callable[[Any, Any, int], None]) -> None:
        self.task = task
        self.each = each
        self.output: Any = None

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        self.output = output

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module's forward."""
        self.handle = pl_module.register_forward_hook(self._hear)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self.handle.remove()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pass the forward's output on; run the forward where the step went around it."""
        if self.output is None:
            args, kwargs = self.task.inputs(batch)
            pl_module(*args, **kwargs)
        output, self.output = self.output, None
        self.each(output, batch, batch_idx)

    on_validation_start = on_test_start
    on_validation_end = on_test_end
    on_validation_batch_end = on_test_batch_end


def forward_pass(
    model: nn.Module,
    batches: Batches,
    task: Task,
    trainer: Trainer,
    title: str,
    each: Callable[[Any, Any, int], None] | None = None,
    at_start: Callable[[], None] | None = None,
    at_end: Callable[[], None] | None = None,
) -> None:
    """Run model on every batch without gradients; outputs go to each(output, batch, index), none is kept."""
    start = time.perf_counter()
    with quiet(), listening(trainer, Listener(each, at_start, at_end)):
        trainer.predict(Forward(model, task), dataloaders=as_shard(batches), return_predictions=False)
    log.info("%s: %.1f s", title, time.perf_counter() - start)


def own_pass(
    model: LightningModule,
    batches: Batches,
    task: Task,
    trainer: Trainer,
    title: str,
    each: Callable[[Any, Any, int], None],
) -> dict[str, float]:
    """Run a LightningModule's own test step (or validation step) and return what it logged."""
    run = trainer.test if is_overridden("test_step", model, LightningModule) else trainer.validate
    start = time.perf_counter()
    with quiet(), listening(trainer, OwnStep(task, each)):
        run(model, dataloaders=as_shard(batches), verbose=False)
    log.info("%s: %.1f s", title, time.perf_counter() - start)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def as_shard(batches: Batches) -> Shard:
    """Keep Lightning from taking a list of batches for several loaders."""
    return batches if isinstance(batches, Shard) else Shard(batches)


def has_own_steps(model: nn.Module) -> bool:
    """Say whether model is a LightningModule that measures itself."""
    steps = ("test_step", "validation_step")
    return isinstance(model, LightningModule) and any(is_overridden(s, model, LightningModule) for s in steps)


@contextmanager
def listening(trainer: Trainer, callback: Callback) -> Iterator[None]:
    """Let a callback take part in what the trainer does."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    callbacks.append(callback)
    try:
        yield
    finally:
        callbacks.remove(callback)

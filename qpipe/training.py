"""The one training loop: weights, and whatever quantizers learn, through Lightning.

A method subclasses Learner (how a tensor is fake-quantized, what is learned of it) and TrainingStrategy
(which tensor gets which learner); optimizer, batch norm, distillation and the trainer's own callbacks
(averaging of weights, early stopping, checkpoints) are the same for all.
"""

from __future__ import annotations

import difflib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_type_hints

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qpipe.distillation import Distillation
from qpipe.errors import DataError, RecipeError
from qpipe.kinds.finetune import FinetuneStrategy
from qpipe.nn import FakeQuant, edge_quantizers, observing, on_blocks, weight_quantizers
from qpipe.noise import quiet
from qpipe.recipe import Slot
from qpipe.restoring import check_placed, check_start, codes_folder, start_from
from qpipe.resuming import Saved
from qpipe.statistics import Extremes
from qpipe.task import Task
from qpipe.types import QParams

if TYPE_CHECKING:
    from qpipe.recipe import Recipe, Reference


class Learner(nn.Module, ABC):
    """Fake-quantize one tensor while the model trains; what it learns ends as plain qparams.

    Args:
        slot: how the tensor is quantized.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    @abstractmethod
    def qparams(self) -> QParams:
        """Return what codes mean now; kept when training ends."""

    def forward(self, x: Tensor) -> Tensor:
        """Round x to its levels, differentiably."""
        return on_blocks(self.slot, x, self.qparams(), training=self.training)

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss, or None."""
        return None

    def constrain(self) -> None:
        """Move parameters back to where they have a meaning; called after each step."""


class Training(TypedDict, total=False):
    """What every training strategy takes; see TrainingStrategy."""

    epochs: int | None
    lr: float
    optimizer: str | Mapping[str, Any]
    schedule: Literal["cosine", "constant"]
    weight_decay: float
    batch_norm: Literal["train", "freeze", "reestimate"]
    keep_zeros: bool
    distill: Mapping[str, Any] | None
    compile: bool
    artifact: str | None
    resume: str | None


_DEFAULTS: Training = {
    "epochs": None,
    "lr": 1e-3,
    "optimizer": "Adam",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "batch_norm": "train",
    "keep_zeros": True,
    "distill": None,
    "compile": False,
    "artifact": None,
    "resume": None,
}


class TrainingStrategy(FinetuneStrategy):
    """Train the prepared model on its task, each quantizer by the learner that `learner` returns for it.

    Args:
        epochs: passes over the training set; None: trainer.max_epochs.
        lr: of weights and learned parameters alike.
        optimizer: a class of torch.optim, or a mapping of 'name' and its arguments.
        schedule: 'cosine' falls from lr to 0 over all steps.
        weight_decay: of the weights; what quantizers learn has none.
        batch_norm: of layers that were not folded: 'train', 'freeze' keeps the statistics, 'reestimate'
            replaces them after training by plain means over one pass.
        keep_zeros: weights that are exactly zero at the start (pruned ones) stay zero.
        distill: arguments of Distillation.
        compile: run the training steps compiled; needs a C++ compiler.
        artifact: a run's folder whose stored codes and ranges training starts from, not this run's own.
        resume: a folder: training is saved there after each epoch, and the same command goes on from there;
            or a checkpoint file of Lightning's to go on from.
    """

    def __init__(self, **training: Unpack[Training]) -> None:
        for key in training:
            if key not in _DEFAULTS:
                raise ValueError(_unknown(key))
        self.training: Training = {**_DEFAULTS, **training}
        self.distillation = Distillation(**(self.training["distill"] or {}))
        self._check()

    def _check(self) -> None:
        for key in ("schedule", "batch_norm"):
            allowed = get_type_hints(Training)[key].__args__
            if self.training[key] not in allowed:
                raise ValueError(f"{key} is one of {', '.join(allowed)}, not {self.training[key]!r}")
        optimizer_class(self.training["optimizer"])
        given: Mapping[str, Any] = {**self.training}
        for key in ("lr", "weight_decay"):
            value = given[key]
            if type(value) not in (int, float) or value < 0:
                raise ValueError(f"{key} is a number from 0, not {value!r}")
        epochs = self.training["epochs"]
        if epochs is not None and (type(epochs) is not int or epochs < 0):
            raise ValueError(f"epochs is a whole number from 0, or null, not {epochs!r}")
        for key in ("keep_zeros", "compile"):
            if type(given[key]) is not bool:
                raise ValueError(f"{key} is true or false, not {given[key]!r}")
        if self.training["artifact"] is not None:
            _check_artifact(Path(self.training["artifact"]))
        resume = self.training["resume"]
        if resume is not None and resume.endswith(".ckpt") and not Path(resume).is_file():
            raise RecipeError(f"resume={resume}: there is no such file")

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return what trains a quantizer, or None to leave its parameters and pass straight through."""
        return None

    def begin(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        """Start learners from data, where a method does so; learners are in place."""

    def check(self, model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
        """Raise RecipeError when there is nothing to train on, no loss to train by, or no such start.

        Args:
            model: before transforms.
        """
        self._check_fits(model, data, task)
        if self.training["artifact"] is not None:
            earlier = takewhile(lambda strategy: strategy is not self, recipe.finetune)
            slots_stay = not any(True for strategy in earlier for _ in strategy.edits(recipe))
            check_start(Path(self.training["artifact"]), model, recipe, slots_stay)

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError when the artifact to start from has other weights or edges."""
        if self.training["artifact"] is not None:
            check_placed(Path(self.training["artifact"]), model)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Train model in place; it comes back in eval mode with plain parameters.

        Raises:
            DataError: the artifact to start from is damaged.
            RecipeError: it was quantized by other words.
        """
        if self.training["artifact"] is not None:
            start_from(Path(self.training["artifact"]), model)
        with self._learning(model) as learners:
            self.begin(model, data, task)
            loop = self._module(model, reference, task, learners)
            saved = Saved.of(self.training["resume"], f"{self.name} {self.training}")
            with ExitStack() as stack:
                stack.enter_context(quiet())
                stack.enter_context(_fresh(trainer, self.training["epochs"]))
                stack.enter_context(listening(trainer, _Hooks(model, task, learners, self.training)))
                if saved.saving is not None:
                    stack.enter_context(listening(trainer, saved.saving))
                trainer.fit(loop, datamodule=data, ckpt_path=saved.found(loop))

    def _check_fits(self, model: nn.Module, data: LightningDataModule, task: Task) -> None:
        if not is_overridden("train_dataloader", data, LightningDataModule):
            raise RecipeError(
                f"finetune '{self.name}' trains, but {type(data).__name__} has no train_dataloader(); "
                "give data that has one, or leave out finetune"
            )
        no_loss = type(task).loss is Task.loss and not trains_itself(model)
        if no_loss and self.distillation.weight < 1:
            raise RecipeError(
                f"finetune '{self.name}' needs a loss, and {type(task).__name__} has none; give a task that "
                f"has one, or learn from the float model alone with finetune.{self.name}.distill.weight=1"
            )
        if trains_itself(model) and self.distillation:
            raise RecipeError(
                f"{type(model).__name__} has its own training_step; distill cannot add to its loss"
            )
        if self.training["compile"] and not _compiler() and not torch.cuda.is_available():
            raise RecipeError("compile=true needs a C++ compiler; install g++, or leave it out")

    @contextmanager
    def _learning(self, model: nn.Module) -> Iterator[list[Learner]]:
        """Put learners in, and at the end keep what they learned as plain parameters."""
        placed: list[tuple[FakeQuant, Learner]] = []
        for fake_quant in fake_quants(model):
            if fake_quant.enabled and not fake_quant.slot.spec.dynamic:
                learner = self.learner(fake_quant)
                if learner is not None:
                    fake_quant.learner = learner
                    placed.append((fake_quant, learner))
        try:
            yield [learner for _, learner in placed]
        finally:
            for fake_quant, learner in placed:
                fake_quant.set_qparams(learner.qparams())
                fake_quant.learner = None
            model.eval()

    def _module(
        self, model: nn.Module, reference: Reference, task: Task, learners: list[Learner]
    ) -> LightningModule:
        model.train()
        if trains_itself(model):
            assert isinstance(model, LightningModule)  # noqa: S101  # for the type checker
            return model
        return _Loop(model, reference.model, task, self, learners)


def _check_artifact(folder: Path) -> None:
    try:
        codes_folder(folder)
    except DataError as error:
        raise RecipeError(f"artifact={error}") from None


def fake_quants(model: nn.Module) -> list[FakeQuant]:
    """Return every quantizer of weights and edges, each once."""
    return [module for module in model.modules() if isinstance(module, FakeQuant)]


def trains_itself(model: nn.Module) -> bool:
    """Say whether model is a LightningModule with a training step of its own."""
    return isinstance(model, LightningModule) and is_overridden("training_step", model, LightningModule)


def mean_magnitudes(
    model: nn.Module, data: LightningDataModule, task: Task
) -> list[tuple[FakeQuant, Tensor]]:
    """Return mean |x| of each block [B, 1]: of weights, and of edges over the first training batch."""
    found = []
    for weight in weight_quantizers(model):
        blocks = weight.fake_quant.slot.granularity.to_blocks(weight.blocks_input())
        found.append((weight.fake_quant, blocks.abs().mean(-1, keepdim=True)))
    seen = {edge: _MeanMagnitude() for edge in edge_quantizers(model) if edge.learner is not None}
    args, kwargs = task.inputs(next(iter(data.train_dataloader())))
    with observing(seen), torch.no_grad():
        model(*args, **kwargs)
    found += [(edge, stats.mean) for edge, stats in seen.items() if stats.mean.numel()]
    return found


class _MeanMagnitude(Extremes):
    """Mean |x| of the last batch."""

    mean = torch.empty(0, 1)

    def update(self, blocks: Tensor) -> None:
        """Take in blocks [B, N]."""
        self.mean = blocks.abs().mean(-1, keepdim=True)


def optimizer_class(chosen: str | Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return a class of torch.optim and its arguments.

    Raises:
        ValueError: there is no such optimizer.
    """
    arguments = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = arguments.pop("name", "Adam")
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"torch.optim has no optimizer '{name}'; try Adam, AdamW or SGD")
    return cls, arguments


class _Loop(LightningModule):
    """Train any model on the loss of its task, its teacher and its learners."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        task: Task,
        strategy: TrainingStrategy,
        learners: list[Learner],
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.training_options = strategy.training
        self.distillation = strategy.distillation
        self.metrics = nn.ModuleDict(dict(task.metrics()))
        compiled = torch.compile(model) if strategy.training["compile"] else model
        self._hidden = (teacher, compiled, learners)  # a tuple: neither saved nor trained twice

    def on_fit_start(self) -> None:
        """Bring the teacher to where the model is."""
        self._hidden[0].to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Return the loss."""
        teacher, compiled, learners = self._hidden
        loss = self.distillation.loss(compiled, self.model, teacher, self.task, batch)
        for learner in learners:
            penalty = learner.penalty()
            loss = loss if penalty is None else loss + penalty
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Log the task's metrics as val_<name>: what early stopping and checkpoints watch."""
        args, kwargs = self.task.inputs(batch)
        output = self.model(*args, **kwargs)
        for name, metric in self.metrics.items():
            metric.update(output, batch)  # type: ignore[operator]  # a torchmetrics Metric
            self.log(f"val_{name}", metric, on_epoch=True, prog_bar=True)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # Lightning's own union
        """Return the optimizer, and the schedule by step."""
        options = self.training_options
        cls, arguments = optimizer_class(options["optimizer"])
        learned = {id(p) for learner in self._hidden[2] for p in learner.parameters()}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in learned]
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) in learned]
        groups = [{"params": weights, "weight_decay": options["weight_decay"]}]
        groups += [{"params": others, "weight_decay": 0.0}] if others else []
        optimizer = cls(groups, lr=options["lr"], **arguments)  # type: ignore[call-arg]
        if options["schedule"] == "constant":
            return optimizer
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Hooks(Callback):
    """Keep learners, batch norm and pruned weights as they were asked to be."""

    def __init__(self, model: nn.Module, task: Task, learners: list[Learner], options: Training) -> None:
        self.model = model
        self.task = task
        self.learners = learners
        self.options = options
        self.masks: list[tuple[nn.Parameter, Tensor]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what is frozen, and note which weights are zero."""
        if self.options["batch_norm"] == "freeze":
            for norm in batch_norms(self.model):
                norm.eval()
        if self.options["keep_zeros"]:
            matrices = (p for p in self.model.parameters() if p.dim() > 1)
            self.masks = [(p, p.detach() != 0) for p in matrices if bool((p == 0).any())]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Put parameters back to where they have a meaning."""
        with torch.no_grad():
            for learner in self.learners:
                learner.constrain()
            for parameter, mask in self.masks:
                parameter.mul_(mask)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate batch norm while the model is still on its device."""
        if self.options["batch_norm"] == "reestimate":
            batches = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # set by fit
            moved = (trainer.strategy.batch_to_device(batch) for batch in batches)
            reestimate(self.model, moved, self.task)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def reestimate(model: nn.Module, batches: Any, task: Task) -> None:  # noqa: ANN401
    """Replace the statistics of batch norm by plain means over batches, the model quantized as it is."""
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
        norm.train()
    with torch.no_grad():
        for batch in batches:
            args, kwargs = task.inputs(batch)
            model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@contextmanager
def _fresh(trainer: Trainer, epochs: int | None) -> Iterator[None]:
    """Let a trainer that already trained start over, for so many epochs, each process on its own samples."""
    loop = trainer.fit_loop
    loop.epoch_progress.reset()
    loop.epoch_loop.batch_progress.reset()
    loop.epoch_loop.scheduler_progress.reset()
    loop.epoch_loop.automatic_optimization.optim_progress.reset()
    trainer.should_stop = False
    connector = trainer._accelerator_connector
    before = loop.max_epochs, connector.use_distributed_sampler
    loop.max_epochs = before[0] if epochs is None else epochs
    connector.use_distributed_sampler = True  # off elsewhere, where a repeated sample would be counted twice
    try:
        yield
    finally:
        loop.max_epochs, connector.use_distributed_sampler = before


@contextmanager
def listening(trainer: Trainer, *lent: Callback) -> Iterator[None]:
    """Lend the trainer callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    callbacks.extend(lent)
    try:
        yield
    finally:
        for callback in lent:
            callbacks.remove(callback)


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _DEFAULTS, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"no key '{key}'; {hint}training takes {', '.join(_DEFAULTS)}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")

"""Figures for the float model, the simulation and every executed file."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe.cache import Entry, Shelf
from qpipe.kinds.evaluator import Evaluator, Subject
from qpipe.stages.forward import forward_pass, has_own_steps, own_pass
from qpipe.stages.samples import PerSample
from qpipe.types import Artifact

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torchmetrics import Metric

    from qpipe.recipe import Recipe, Reference
    from qpipe.task import Batches, Task

CACHE_BYTES = 256 * 2**20  # of reference outputs; beyond it they are computed again for each variant
_LEAST_ROOM = CACHE_BYTES - 32 * 2**20  # left of them, or the outputs are too many for the store

Figures = dict[str, dict[str, float]]


def check_gate(model: nn.Module, task: Task, recipe: Recipe) -> None:
    """Refuse a gate on a metric that nobody will measure, as far as that can be told before the run.

    Raises:
        RecipeError: says what is measured.
    """
    fp32, simulated = (expected(model, task, recipe, variant) for variant in ("fp32", "simulated"))
    if fp32 is not None and simulated is not None:
        recipe.gate.expect(fp32, simulated)


def expected(model: nn.Module, task: Task, recipe: Recipe, variant: str) -> Collection[str] | None:
    """Return the names that will be measured of a variant; None: that cannot be told before the run."""
    if has_own_steps(model) or any(_is_undeclared(evaluator) for evaluator in recipe.evaluators):
        return None
    metrics = [name for evaluator in recipe.evaluators for name in evaluator.metrics(task, variant)]
    return [*metrics, *(name for evaluator in recipe.evaluators for name in evaluator.measured)]


def _is_undeclared(evaluator: Evaluator) -> bool:
    return type(evaluator).measure is not Evaluator.measure and not evaluator.measured


def evaluate(
    simulation: nn.Module,
    reference: Reference,
    artifacts: Sequence[Artifact],
    batches: Batches,
    task: Task,
    recipe: Recipe,
    trainer: Trainer,
    shelf: Shelf | None = None,
) -> tuple[Figures, dict[str, Any], dict[str, Tensor]]:
    """Return metrics by variant and name, tables by 'variant.evaluator', samples by 'variant.metric'.

    Args:
        shelf: what was measured of this float model on these batches before.

    The variants are 'fp32', 'simulated' and the exporter's name of every file an engine executes.
    """
    variants: dict[str, tuple[nn.Module, Artifact | None]] = {
        "fp32": (reference.model, None),
        "simulated": (simulation, None),
        **{a.exporter: (a.module, a) for a in artifacts if a.module is not None},
    }
    baseline = shelf or Shelf()
    outputs = ReferenceOutputs(reference.model, task)
    if (entry := baseline.get(["outputs"])) is not None:
        outputs.load(entry)
    figures: Figures = {}
    tables: dict[str, Any] = {}
    samples: dict[str, Tensor] = {}
    for variant, (model, artifact) in variants.items():
        known = baseline if variant == "fp32" else Shelf()
        kept = PerSample(recipe, task)
        figures[variant] = score(
            variant, model, reference, outputs, batches, task, recipe, trainer, known, kept
        )
        samples |= {f"{variant}.{name}": values for name, values in kept.gathered().items()}
        subject = Subject(variant, model, reference, batches, task, recipe, artifact)
        measured, rows = measure(subject, trainer.strategy.root_device, known)
        figures[variant] |= measured
        tables |= rows
    if entry is None and (entry := outputs.entry()) is not None:
        baseline.put(["outputs"], entry)
    return figures, tables, samples


class ReferenceOutputs:
    """Serve the float model's output of each batch, remembered up to CACHE_BYTES."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model = model
        self.task = task
        self.room = CACHE_BYTES
        self.outputs: dict[int, Any] = {}

    def remember(self, index: int, output: Any) -> None:  # noqa: ANN401
        """Keep an output while there is room."""
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        if index not in self.outputs and size <= self.room:
            self.room -= size
            self.outputs[index] = output

    def get(self, index: int, batch: Any) -> Any:  # noqa: ANN401
        """Return the output of a batch, computed if it was not kept."""
        device = next((leaf.device for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)), None)
        if index in self.outputs:
            return move_data_to_device(self.outputs[index], device) if device else self.outputs[index]
        args, kwargs = self.task.inputs(batch)
        output = self.model.to(device)(*args, **kwargs)
        self.remember(index, output)
        return output

    def entry(self) -> Entry | None:
        """Return the outputs, if they are tensors in plain containers, all there and not too many."""
        leaves, spec = pytree.tree_flatten([self.outputs[index] for index in sorted(self.outputs)])
        complete = [*sorted(self.outputs)] == [*range(len(self.outputs))]
        if not leaves or not complete or self.room < _LEAST_ROOM:
            return None
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        try:
            text = pytree.treespec_dumps(spec)
        except NotImplementedError:  # a container nobody can name
            return None
        return Entry({str(i): leaf for i, leaf in enumerate(leaves)}, text)

    def load(self, entry: Entry) -> None:
        """Remember an entry's outputs."""
        leaves = [entry.tensors[str(i)] for i in range(len(entry.tensors))]
        for index, output in enumerate(pytree.tree_unflatten(leaves, pytree.treespec_loads(entry.data))):
            self.remember(index, output)


def score(
    variant: str,
    model: nn.Module,
    reference: Reference,
    outputs: ReferenceOutputs,
    batches: Batches,
    task: Task,
    recipe: Recipe,
    trainer: Trainer,
    shelf: Shelf | None = None,
    per_sample: PerSample | None = None,
) -> dict[str, float]:
    """Return every evaluator's metrics, and the model's own, from one pass of a variant.

    Args:
        shelf: what was measured of it before.
        per_sample: is told of each batch of a quantized variant.
    """
    shelf = shelf or Shelf()
    if (entry := shelf.get(["pass", recipe.evaluators])) is not None:
        figures: dict[str, float] = entry.data
        return figures
    metrics: dict[str, Metric] = {}
    for evaluator in recipe.evaluators:
        metrics |= evaluator.metrics(task, variant)
    for metric in metrics.values():
        metric.to(trainer.strategy.root_device)

    def each(output: Any, batch: Any, index: int) -> None:  # noqa: ANN401
        if variant == "fp32":
            outputs.remember(index, output)
        expected = output if variant == "fp32" else outputs.get(index, batch)
        for metric in metrics.values():
            metric.update(output, expected, batch)
        if per_sample is not None and variant != "fp32":
            per_sample.take(output, expected, batch)

    title = f"evaluate {variant}"
    own: dict[str, float] = {}
    if has_own_steps(reference.model):
        own = own_pass(stand_in(reference.model, model), batches, task, trainer, title, each)
    elif metrics:
        forward_pass(model, batches, task, trainer, title, each)
    figures = own | {name: float(metric.compute()) for name, metric in metrics.items()}
    if shelf.store:
        shelf.put(["pass", recipe.evaluators], Entry(data=figures))
    return figures


def stand_in(module: nn.Module, model: nn.Module) -> LightningModule:
    """Return model if it has steps of its own, else a copy of module whose forward is model's."""
    if isinstance(model, LightningModule):
        return model
    double = copy.copy(module)
    double.__dict__["forward"] = model.__call__
    if not isinstance(double, LightningModule):
        raise TypeError(f"{type(module).__name__} has no steps of its own")
    return double


def measure(subject: Subject, device: torch.device, shelf: Shelf) -> tuple[dict[str, float], dict[str, Any]]:
    """Return what every evaluator measures outside the pass, model and batches being on a device."""
    figures: dict[str, float] = {}
    tables: dict[str, Any] = {}
    homes = {
        m: next((p.device for p in m.parameters()), None) for m in (subject.model, subject.reference.model)
    }
    try:
        for model in homes:
            model.to(device)
        moved = Subject(**{**vars(subject), "batches": OnDevice(subject.batches, device)})
        for evaluator in subject.recipe.evaluators:
            entry = shelf.get(["measure", evaluator])
            if entry is None:
                entry = Entry(data=[dict(evaluator.measure(moved)), dict(evaluator.tables(moved))])
                shelf.put(["measure", evaluator], entry, evaluator.repeatable)
            measured, rows = entry.data
            figures |= measured
            if rows:
                tables[f"{subject.variant}.{evaluator.name}"] = rows
    finally:
        for model, home in homes.items():
            model.to(home)
    return figures, tables


class OnDevice:
    """Serve batches moved to a device."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        return (move_data_to_device(batch, self.device) for batch in self.batches)

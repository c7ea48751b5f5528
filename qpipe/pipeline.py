"""A run, from what was chosen to what came of it: one straight line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from qpipe.cache import Shelf
from qpipe.choices import build_recipe, library_config
from qpipe.heap import reusing
from qpipe.identity import model_digest
from qpipe.nn import edge_quantizers
from qpipe.noise import quiet
from qpipe.packing import payload_bytes
from qpipe.page.render import only_a_page
from qpipe.page.run import write_page
from qpipe.recipe import Recipe, Reference
from qpipe.record import environment, staged, write_record
from qpipe.registry import PluginRegistry
from qpipe.sharing import shared_copy
from qpipe.stages.calibrate import calibrate, calibrate_weights
from qpipe.stages.data import as_datamodule, calibration_batches, evaluation_batches
from qpipe.stages.evaluate import check_gate, evaluate
from qpipe.stages.export import export
from qpipe.stages.prepare import Preparation, prepare
from qpipe.task import Task
from qpipe.types import QParams, Report

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe.kinds.finetune import FinetuneStrategy
    from qpipe.kinds.transform import Transform
    from qpipe.statistics import Statistics


def run(
    model: nn.Module,
    data: LightningDataModule,
    task: Task,
    recipe: Recipe,
    trainer: Trainer,
    folder: Path | None = None,
    num_samples: int = 256,
    config: Mapping[str, Any] | None = None,
    identity: str = "",
    also: Collection[type[Statistics]] = (),
) -> tuple[nn.Module, Report]:
    """Quantize a copy of model, prove it and report; each line needs only the lines above it.

    Args:
        folder: where the report and the artifacts go, all at once when the run is complete; None: nowhere.
        num_samples: samples of the calibration set that are read.
        config: what the recipe was built from; stored as config.yaml, from which the run can be repeated.
        identity: of everything the run depends on, for the report.
        also: statistics to collect in the pass, for later runs of this model.
    """
    _check(model, data, task, recipe)
    if trainer.world_size > 1:  # processes that find different things would wait for each other
        recipe = replace(recipe, shelf=Shelf())
    calibration = calibration_batches(data, num_samples)
    evaluation = evaluation_batches(data)
    with _as_reference(model) as reference, staged(folder) as staging, reusing(model):
        shelves = _Shelves(recipe, model, (config or {}).get("trainer"))
        simulation = shared_copy(model).eval()
        for transform in recipe.transforms:
            transform.apply(simulation, calibration, task, shelves.after(transform))
        facts = shelves.true_of(simulation, "statistics")
        preparation = prepare(simulation, calibration, task, recipe, facts)
        _check_prepared(simulation, recipe)
        with isolate_rng():  # what follows draws the same numbers whether a pass was needed or not
            notices = calibrate(simulation, calibration, task, trainer, facts, also)
        told: dict[str, Any] = {}
        for strategy in recipe.finetune:
            told |= strategy.fit(simulation, reference, data, task, shelves.after(strategy), trainer) or {}
        final = preparation.now(simulation)
        artifacts = export(simulation, reference, evaluation, task, recipe, staging)
        metrics, tables, samples = evaluate(
            simulation, reference, artifacts, evaluation, task, recipe, trainer, shelves.baseline
        )
        report = Report(
            metrics,
            *_rows(final),
            final.skipped,
            (*recipe.notices, *notices, *task.notices(metrics)),
            artifacts,
            environment(),
            told | tables,
            folder,
            identity,
            tuple(f"{kind} ({count})" for kind, count in sorted(recipe.shelf.taken.items()) if count),
        )
        write_record(report, config, staging, samples)
        if folder:
            with only_a_page(folder):
                write_page(staging, known_as=folder)
    return simulation, report


class _Shelves:
    """The shelf of each step: it depends on what was chosen, and on what was done before.

    Args:
        training: how the trainer trains.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, training: Any) -> None:  # noqa: ANN401  # plain data
        self.recipe = recipe
        self.shelf = recipe.shelf
        weights = model_digest(model) if self.shelf.store else ""
        self.baseline = self.shelf.of("baseline", weights)
        self.slots = (recipe.weight, recipe.activation, recipe.layers, recipe.target)
        self.parts: tuple[Any, ...] = (weights, training)

    def after(self, step: Transform | FinetuneStrategy) -> Recipe:
        """Return the recipe with the shelf of a step."""
        self.parts = (*self.parts, step, self.slots if getattr(step, "reads_slots", True) else None)
        return replace(self.recipe, shelf=self.shelf.of(step.name, *self.parts))

    def true_of(self, model: nn.Module, kind: str) -> Shelf:
        """Return the shelf of what is true of a float model, whatever else was chosen."""
        return self.shelf.of(kind, model_digest(model)) if self.shelf.store else self.shelf


def plan(
    model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe, num_samples: int = 256
) -> Report:
    """Say what run() would do: edges, weights, size, and what stays in floating point; nothing is written."""
    _check(model, data, task, recipe)
    calibration = calibration_batches(data, num_samples)
    simulation = shared_copy(model).eval()
    for transform in recipe.transforms:
        transform.apply(simulation, calibration, task, recipe)
    preparation = prepare(simulation, calibration, task, recipe)
    _check_prepared(simulation, recipe)
    calibrate_weights(simulation)
    static = [edge for edge in edge_quantizers(simulation) if not edge.calibrated]
    for edge in static:
        edge.set_qparams(QParams(torch.ones(1, 1), torch.zeros(1, 1)))
    planned = {"size_bytes": float(payload_bytes(simulation)), "calibration_passes": float(bool(static))}
    return Report(
        {"fp32": {"size_bytes": float(payload_bytes(model))}, "planned": planned},
        *_rows(preparation),
        preparation.skipped,
        recipe.notices,
    )


def quantize(
    model: nn.Module,
    data: Any,  # noqa: ANN401  # a data module, a loader, batches or one tensor
    *,
    task: Task | None = None,
    trainer: Trainer | None = None,
    out: str | Path | None = None,
    num_samples: int = 256,
    **choices: Any,  # noqa: ANN401  # the command line's words
) -> tuple[nn.Module, Report]:
    """Quantize a copy of model and return it with the report: the command line without Hydra.

    Args:
        model: any module; left as it is.
        data: a LightningDataModule, a DataLoader, batches, or a tensor of samples.
        task: how a batch feeds the model and what is measured.
        trainer: a Lightning trainer; by default one process on the CPU or the GPU that is there.
        out: folder for report.json and the artifacts; None writes nothing and exports nothing.
        num_samples: samples of the calibration set that are read.
        choices: quantizer="kl", granularity="channel", calibrator=…, target=…, transform=[…],
            finetune=[…], evaluator=[…], exporter=[…], layers=[…], weight={"num_bits": 4},
            activation=None, gate={"max_drop": 1}; a name, or a mapping with 'name' and its arguments.

    Raises:
        RecipeError: the choices have no meaning together.
        DataError: weights or activations cannot be used.
        GateError: a gate was given and is not met; what out names is kept.
    """
    registry = PluginRegistry.load_installed()
    recipe = build_recipe(library_config(choices, exporting=out is not None), registry)
    recipe = replace(recipe, notices=(*registry.notices, *recipe.notices))
    simulation, report = run(
        model,
        as_datamodule(data),
        task or Task(),
        recipe,
        trainer or _quiet_trainer(),
        Path(out).absolute() if out is not None else None,
        num_samples,
    )
    recipe.gate.check(report.metrics)
    return simulation, report


def _check(model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe) -> None:
    """Refuse what has no meaning for this task, before any data is read."""
    check_gate(model, task, recipe)
    for strategy in recipe.finetune:
        strategy.check(model, data, task, recipe)


def _check_prepared(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a prepared model that a strategy cannot begin with, before any pass over data."""
    for strategy in recipe.finetune:
        strategy.check_prepared(model)


def _rows(preparation: Preparation) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    edges = tuple({**vars(edge), **slot.describe()} for edge, slot in preparation.edges)
    weights = tuple(
        {"name": name, "shape": [*shape], **slot.describe()} for name, shape, slot in preparation.weights
    )
    return edges, weights


@contextmanager
def _as_reference(model: nn.Module) -> Iterator[Reference]:
    """Lend the user's model as the baseline, in eval mode, and give it back as it was."""
    training = {module: module.training for module in model.modules()}
    try:
        yield Reference(model.eval())
    finally:
        for module, flag in training.items():
            module.training = flag


def _quiet_trainer() -> Trainer:
    from pytorch_lightning import Trainer

    with quiet():
        return Trainer(
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

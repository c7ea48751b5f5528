"""A run, from what was chosen to what came of it: one straight line."""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from qpipe.errors import RecipeError
from qpipe.recipe import LayerRule, Recipe, Reference, Slot, SlotEdit
from qpipe.registry import PluginRegistry, conf_dir
from qpipe.stages.calibrate import calibrate
from qpipe.stages.data import as_datamodule, calibration_batches, evaluation_batches
from qpipe.stages.evaluate import evaluate
from qpipe.stages.export import export
from qpipe.stages.prepare import Preparation, place, prepare
from qpipe.task import Task
from qpipe.types import QuantSpec, Report, Role, Target

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

_SLOT_KINDS = ("quantizer", "calibrator", "granularity")
_Config = Mapping[str, Any]


def run(
    model: nn.Module,
    data: LightningDataModule,
    task: Task,
    recipe: Recipe,
    trainer: Trainer,
    folder: Path | None = None,
    num_samples: int = 256,
    config: _Config | None = None,
) -> tuple[nn.Module, Report]:
    """Quantize a copy of model, prove it and report; each line needs only the lines above it.

    Args:
        folder: where the report and the artifacts go, all at once when the run is complete; None: nowhere.
        num_samples: samples of the calibration set that are read.
        config: what the recipe was built from; stored as config.yaml, from which the run can be repeated.
    """
    calibration = calibration_batches(data, num_samples)
    evaluation = evaluation_batches(data)
    with _as_reference(model) as reference, _staging(folder) as staging:
        simulation = copy.deepcopy(model).eval()
        for transform in recipe.transforms:
            transform.apply(simulation, calibration, task, recipe)
        preparation = prepare(simulation, calibration, task, recipe)
        notices = calibrate(simulation, calibration, task, trainer)
        for strategy in recipe.finetune:
            strategy.fit(simulation, reference, data, task, recipe, trainer)
        artifacts = export(simulation, reference, evaluation, task, recipe, staging)
        metrics, tables = evaluate(simulation, reference, artifacts, evaluation, task, recipe, trainer)
        report = Report(
            metrics,
            *_rows(preparation),
            preparation.skipped,
            (*recipe.notices, *notices),
            artifacts,
            environment(),
            tables,
            folder,
        )
        _write_record(report, config, staging)
    return simulation, report


def plan(
    model: nn.Module, data: LightningDataModule, task: Task, recipe: Recipe, num_samples: int = 256
) -> Report:
    """Say what run() would do: edges, weights and what stays in floating point; nothing is written."""
    calibration = calibration_batches(data, num_samples)
    simulation = copy.deepcopy(model).eval()
    for transform in recipe.transforms:
        transform.apply(simulation, calibration, task, recipe)
    preparation = place(simulation, calibration, task, recipe)
    return Report({}, *_rows(preparation), preparation.skipped, recipe.notices)


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
            activation=None; a name, or a mapping with 'name' and its arguments.

    Raises:
        RecipeError: the choices have no meaning together.
        DataError: weights or activations cannot be used.
    """
    registry = PluginRegistry.load_installed()
    recipe = build_recipe(library_config(choices, exporting=out is not None), registry)
    return run(
        model,
        as_datamodule(data),
        task or Task(),
        recipe,
        trainer or _quiet_trainer(),
        Path(out).absolute() if out is not None else None,
        num_samples,
    )


def build_recipe(config: _Config, registry: PluginRegistry) -> Recipe:
    """Turn a resolved configuration into objects; whatever has no meaning is refused here.

    Args:
        config: plain data; 'explicit' lists the groups the user named.

    Raises:
        RecipeError: a slot cannot be served, or an exporter that was named cannot express the recipe.
    """
    notices: list[str] = []
    target = _target(config["target"])
    weight = _slot(config, Role.WEIGHT, registry, notices)
    activation = _slot(config, Role.ACTIVATION, registry, notices)
    recipe = Recipe(
        weight,
        activation,
        target,
        tuple(_rule(rule, config, registry) for rule in config.get("layers") or ()),
        *(_several(kind, config, registry) for kind in ("transform", "finetune", "evaluator", "exporter")),
    )
    notices += _not_executed(recipe)
    exporters = []
    for exporter in recipe.exporters:
        reason = exporter.reason_not(recipe)
        if reason is None:
            exporters.append(exporter)
        elif "exporter" in config.get("explicit", ()):
            raise RecipeError(f"exporter '{exporter.name}' cannot express this recipe: {reason}")
        else:
            notices.append(f"exporter '{exporter.name}' is passed over: {reason}")
    return replace(recipe, exporters=tuple(exporters), notices=tuple(notices))


def library_config(choices: _Config, exporting: bool) -> dict[str, Any]:
    """Return the configuration the command line would have composed from the same words.

    Raises:
        RecipeError: a word the configuration does not know.
    """
    text = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    config: dict[str, Any] = {
        "quantizer": "uniform",
        "calibrator": "minmax",
        "granularity": "channel",
        "target": "x86",
        "weight": text["weight"],
        "activation": text["activation"],
        "layers": [],
        "transform": ["fold_bn"],
        "finetune": [],
        "evaluator": ["sqnr", "size"],
        "exporter": ["safetensors", "onnx"] if exporting else [],
        "explicit": [*choices],
    }
    for key, value in choices.items():
        if key not in config:
            raise RecipeError(f"quantize() has no argument '{key}'; it takes {', '.join(sorted(config))}")
        both_maps = isinstance(config[key], Mapping) and isinstance(value, Mapping)
        config[key] = {**config[key], **value} if both_maps else value
    for key, value in _preset(config["quantizer"]).items():
        if key not in choices or key == "quantizer":
            config[key] = value
    for role in (role.value for role in Role):
        if isinstance(config[role], Mapping):
            config[role] = _without_preset(config[role], role)
    if isinstance(config["target"], str):
        config["target"] = _target_file(config["target"])
    return config


def environment() -> dict[str, Any]:
    """Return what a figure depends on beside the recipe: versions, processor, threads."""
    packages = ("qpipe-quant", "torch", "pytorch-lightning", "onnxruntime")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def report_dict(report: Report) -> dict[str, Any]:
    """Return a report as plain data, for JSON."""
    artifacts = [
        {**{k: v for k, v in vars(a).items() if k != "module"}, "path": str(a.path), "proof": dict(a.proof)}
        for a in report.artifacts
    ]
    rest = {k: v for k, v in vars(report).items() if k not in ("artifacts", "folder")}
    return {**rest, "artifacts": artifacts}


def _slot(config: _Config, role: Role, registry: PluginRegistry, notices: list[str]) -> Slot | None:
    chosen = config[role.value]
    if chosen is None:
        return None
    parts = {kind: _part(kind, chosen, config, role, registry, notices) for kind in _SLOT_KINDS}
    spec = _spec({k: v for k, v in chosen.items() if k not in _SLOT_KINDS}, role)
    return _checked(Slot(**parts, spec=spec), role)


def _part(
    kind: str, chosen: _Config, config: _Config, role: Role, registry: PluginRegistry, notices: list[str]
) -> Any:  # noqa: ANN401  # an instance of that kind
    explicit = chosen.get(kind)
    part = registry.create(kind, explicit or config[kind])
    if role in part.roles:
        return part
    if explicit is not None:
        raise RecipeError(_cannot_serve(kind, part, role, registry))
    stand_in = part.stand_in.get(role)
    if stand_in is None:
        raise RecipeError(_cannot_serve(kind, part, role, registry))
    notices.append(f"{kind} '{part.name}' does not serve {role.value}s; they get '{stand_in}'")
    return registry.create(kind, stand_in)


def _cannot_serve(kind: str, part: Any, role: Role, registry: PluginRegistry) -> str:  # noqa: ANN401
    others = [name for name in registry.names(kind) if role in registry.get(kind, name).roles]
    why = getattr(part, "why_not", {}).get(role)
    because = f": {why}" if why else ""
    return (
        f"{kind} '{part.name}' cannot serve {role.value}s ({role.value}.{kind}={part.name}){because}; "
        f"use {', '.join(others)} there"
    )


def _spec(fields: _Config, role: Role) -> QuantSpec:
    try:
        return QuantSpec(role=role, **fields)
    except TypeError:
        known = [name for name in QuantSpec.__dataclass_fields__ if name != "role"]
        unknown = ", ".join(f"'{key}'" for key in fields if key not in known)
        raise RecipeError(f"{role.value} has no key {unknown}; it takes {', '.join(known)}") from None


def _checked(slot: Slot, role: Role) -> Slot:
    spec = slot.spec
    if role is Role.WEIGHT and spec.dynamic:
        raise RecipeError("weight.dynamic=true has no meaning: weights do not change from batch to batch")
    if slot.granularity.dynamic_only and not spec.dynamic:
        raise RecipeError(
            f"granularity '{slot.granularity.name}' has as many scales as the tensor has rows; "
            f"it needs {role.value}.dynamic=true"
        )
    if spec.dynamic and slot.quantizer.uses_range and not slot.calibrator.dynamic:
        raise RecipeError(
            f"calibrator '{slot.calibrator.name}' needs many batches; use minmax with {role.value}.dynamic=true"
        )
    slot.quantizer.check(spec)
    return slot


def _rule(rule: _Config, config: _Config, registry: PluginRegistry) -> LayerRule:
    if "match" not in rule or not set(rule) <= {"match", *Role}:
        raise RecipeError(
            f"a layer rule is {{match: pattern, weight: {{…}}, activation: {{…}}}}, not {dict(rule)}"
        )
    edits = {role: _edit(rule[role.value], role, config, registry) for role in Role if role.value in rule}
    if not edits:
        raise RecipeError(
            f"the layer rule for '{rule['match']}' changes nothing; give it weight or activation"
        )
    return LayerRule(rule["match"], edits)


def _edit(fields: _Config | None, role: Role, config: _Config, registry: PluginRegistry) -> SlotEdit:
    if fields is None:
        return SlotEdit(off=True)
    parts = {
        kind: registry.create(kind, fields[kind]) for kind in _SLOT_KINDS if fields.get(kind) is not None
    }
    for kind, part in parts.items():
        if role not in part.roles:
            raise RecipeError(_cannot_serve(kind, part, role, registry))
    spec = {k: v for k, v in fields.items() if k not in _SLOT_KINDS}
    edit = SlotEdit(**parts, spec=spec)
    base = _slot({**config, role.value: config[role.value] or {}}, role, registry, [])
    _spec({**asdict_spec(base), **spec}, role)
    merged = edit.apply(base, base)
    if merged is not None:
        _checked(merged, role)
    return edit


def asdict_spec(slot: Slot | None) -> dict[str, Any]:
    """Return a slot's spec as keyword arguments, its role left out."""
    return {k: v for k, v in asdict(slot.spec).items() if k != "role"} if slot else {}


def _several(kind: str, config: _Config, registry: PluginRegistry) -> tuple[Any, ...]:
    chosen = config.get(kind) or ()
    entries: Sequence[Any] = [*chosen.values()] if isinstance(chosen, Mapping) else chosen
    return tuple(registry.create(kind, entry) for entry in entries)


def _not_executed(recipe: Recipe) -> Iterator[str]:
    """Say what of the recipe the target has no kernels for."""
    target = recipe.target
    for role, slot in ((Role.WEIGHT, recipe.weight), (Role.ACTIVATION, recipe.activation)):
        if slot is None:
            continue
        allowed = {
            "num_bits": getattr(target, f"{role.value}_bits"),
            "granularity": getattr(target, f"{role.value}_granularities"),
        }
        for key in ("signed", "symmetric"):
            fixed = getattr(target, f"{role.value}_{key}")
            allowed[key] = () if fixed is None else (fixed,)
        if slot.spec.dynamic and not target.dynamic:
            yield f"target '{target.name}' has no dynamic ranges: {role.value} figures are simulated"
        if not slot.quantizer.is_affine(slot.spec):
            yield f"no engine of target '{target.name}' executes quantizer '{slot.quantizer.name}': simulated"
        described = slot.describe()
        for key, values in allowed.items():
            if values and described[key] not in values:
                words = " or ".join(str(v).lower() for v in values)
                yield (
                    f"target '{target.name}' executes {role.value}.{key}={words}, "
                    f"not {str(described[key]).lower()}: simulated"
                )


def _target(fields: _Config) -> Target:
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    try:
        return Target(**values)
    except TypeError as error:
        raise RecipeError(f"target '{fields.get('name')}': {error}") from None


def _target_file(name: str) -> dict[str, Any]:
    folder = conf_dir() / "target"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"no target named '{name}'; installed: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}"
        )
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def _preset(quantizer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a preset in conf/quantizer stands for, {} when the word is no preset."""
    path = conf_dir() / "quantizer" / f"{quantizer}.yaml"
    if not isinstance(quantizer, str) or not path.is_file():
        return {}
    words: dict[str, Any] = {}
    arguments = yaml.safe_load(path.read_text())
    for entry in arguments.pop("defaults"):
        if isinstance(entry, str) and entry != "_self_":
            words["quantizer"] = entry
        elif isinstance(entry, Mapping):
            words |= {key.split("/")[-1].split("@")[0]: value for key, value in entry.items()}
    return {**words, "quantizer": {"name": words["quantizer"], **arguments}} if arguments else words


def _without_preset(slot: _Config, role: str) -> dict[str, Any]:
    """Return a slot with the preset of its quantizer, if it is one, written out."""
    words = _preset(slot.get("quantizer"))
    if len(words) > 1:
        raise RecipeError(
            f"{role}.quantizer={slot['quantizer']} is a preset that chooses the shared calibrator too; "
            f"say {role}.calibrator={words['calibrator']} instead"
        )
    return {**slot, **words}


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


@contextmanager
def _staging(folder: Path | None) -> Iterator[Path]:
    """Yield a folder to write into; it becomes folder when the block ends well, and vanishes otherwise."""
    parent = folder.parent if folder else Path(tempfile.gettempdir())
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"out={folder} exists already and is not an empty folder; choose another")
    made = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name if folder else 'qpipe'}-", dir=parent))
    except OSError as error:
        raise RecipeError(
            f"out={folder} cannot be written: {error.strerror}; choose another folder"
        ) from None
    staging.chmod(0o755)
    try:
        yield staging
        if folder:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # what now holds the run stays
            for place in made:
                place.rmdir()


def _write_record(report: Report, config: _Config | None, folder: Path) -> None:
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    (folder / "report.json").write_text(json.dumps(report_dict(report), indent=1, default=str) + "\n")


def _quiet_trainer() -> Trainer:
    from pytorch_lightning import Trainer

    return Trainer(
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")

"""What a configuration names by `_target_`: the user's model, data, task and trainer."""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate

from qpipe.errors import DataError, QpipeError, RecipeError
from qpipe.registry import suggest

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer
    from pytorch_lightning.loggers import Logger
    from torch import nn

    from qpipe.task import Task

logging.getLogger("hydra").addHandler(logging.NullHandler())  # what it would log is in the sentence
_Config = Mapping[str, Any]
_OURS = ("weights", "weights_only_pt")  # keys of model that its constructor does not see, unless it has them


def build_model(config: _Config) -> nn.Module:
    """Build the model and load `weights` into it: a safetensors file, or a .pt with weights_only_pt=true.

    Raises:
        RecipeError: it cannot be built, or the weights file is missing or is another model's.
        DataError: the weights file is damaged, or a pickle nobody vouched for.
    """
    from torch import nn

    taken = _parameters("model", config)
    own = {key: value for key, value in config.items() if key not in _OURS or key in taken}
    model = _build("model", own)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model._target_={config['_target_']} made a {type(model).__name__}, no torch module"
        )
    if config.get("weights") and "weights" not in taken:
        load_weights(model, Path(config["weights"]).expanduser(), bool(config.get("weights_only_pt")))
    return model


def build_data(config: _Config) -> LightningDataModule:
    """Build the data module; a loader, batches or a tensor are wrapped in one."""
    from qpipe.stages.data import as_datamodule

    return as_datamodule(
        _build("data", {key: value for key, value in config.items() if key != "calibration"})
    )


def build_task(config: _Config) -> Task:
    """Build the task."""
    from qpipe.task import Task

    task = _build("task", config)
    if not isinstance(task, Task):
        raise RecipeError(f"task._target_={config['_target_']} made a {type(task).__name__}, no qpipe.Task")
    return task


def build_trainer(config: _Config, logger: Logger | bool) -> Trainer:
    """Build the Lightning trainer, with progress bars on a terminal only."""
    extra: dict[str, Any] = {"logger": logger} if "logger" not in config else {}
    if "enable_progress_bar" not in config and not sys.stderr.isatty():
        extra["enable_progress_bar"] = False
    elif "callbacks" not in config and sys.stderr.isatty():
        from pytorch_lightning.callbacks import RichProgressBar

        extra["callbacks"] = [RichProgressBar(leave=False)]
    trainer: Trainer = _build("trainer", config, extra)
    return trainer


def load_weights(model: nn.Module, path: Path, trusted: bool = False) -> None:
    """Read every tensor of a file into model; tied tensors may be stored once.

    Args:
        trusted: read a .pt file's tensors (weights_only=True).

    Raises:
        RecipeError: there is no such file, or its names or shapes are not the model's.
        DataError: the file is damaged, or a pickle.
    """
    if not path.is_file():
        raise RecipeError(f"model.weights={path}: there is no such file{_nearby(path)}")
    missing, unexpected = _load(model, path, trusted)
    for names, what in ((missing, "lacks"), (unexpected, "holds")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            whose = "which the model has" if what == "lacks" else "which the model has not"
            raise RecipeError(f"model.weights={path} {what} {some}, {whose}; is it another model's file?")


def _load(model: nn.Module, path: Path, trusted: bool) -> tuple[list[str], list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        if _is_pickle(path):
            missing, unexpected = model.load_state_dict(_unpickle(path, trusted), strict=False)
        else:
            missing, unexpected = load_model(model, path, strict=False)
    except SafetensorError as error:
        raise DataError(
            f"model.weights={path} is no complete safetensors file ({error}); copy or download it again"
        ) from None
    except RuntimeError as error:
        mismatch = next(
            (line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error)
        )
        raise RecipeError(f"model.weights={path} does not fit the model: {mismatch}") from None
    return list(missing), list(unexpected)


def _unpickle(path: Path, trusted: bool) -> dict[str, Any]:
    if not trusted:
        raise DataError(
            f"model.weights={path} is a pickle, which can run code when it is read; save it as safetensors, "
            "or read nothing but its tensors with model.weights_only_pt=true"
        )
    import pickle  # for the name of its exception

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"model.weights={path} holds more than tensors, or is damaged: {first}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise DataError(f"model.weights={path} holds a {type(state).__name__}, not tensors by name")
    return dict(state)


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or torch's archive of one; safetensors is a length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK")


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _build(what: str, config: _Config, extra: _Config | None = None) -> Any:  # noqa: ANN401  # the user's
    """Call `_target_` with the other keys, every mistake one sentence."""
    known = _parameters(what, config)
    label = f"{what}._target_={config['_target_']}"
    if "**" not in known:
        for key in config:
            if key not in known and not key.startswith("_"):
                hint = suggest(key, known) or ";"
                raise RecipeError(f"{label} takes no '{key}'{hint} it takes {', '.join(known) or 'nothing'}")
    try:
        return instantiate(dict(config), **(extra or {}), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, QpipeError):
            raise cause from None
        raise RecipeError(f"{label} cannot be built: {_said(cause)}") from cause


def _parameters(what: str, config: _Config) -> list[str]:
    """Return the names a target takes; '**' if it takes any."""
    target = config.get("_target_")
    if not target:
        raise RecipeError(f"{what} has no _target_; give it {what}._target_=package.module.Name")
    try:
        function = get_object(target)
    except (HydraException, ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"{what}._target_={target} cannot be imported: {_missing(target, error)}") from None
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["**"]
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


def _missing(target: str, error: Exception) -> str:
    cause = error.__cause__ or error
    module, _, name = target.rpartition(".")
    if module in sys.modules:
        return f"'{module}' has no '{name}'{suggest(name, dir(sys.modules[module]))}"
    return _said(cause)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""From a folder back to a working module."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.artifact import PLAIN, example, read_codes, sha256
from qpipe.errors import DataError
from qpipe.nn import ChannelClip
from qpipe.recipe import Recipe, Slot
from qpipe.registry import PluginRegistry
from qpipe.restoring import codes_folder, fitting, restore
from qpipe.stages.prepare import prepare
from qpipe.task import Task
from qpipe.types import QuantSpec, Role, Target


def load(folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return a working module from a run's folder.

    Args:
        folder: what `out=` named, or the folder of one exporter in it.
        model: the float model, or what makes it; it is given the stored codes and computes what the
            simulation computed. None: an artifact that runs by itself, such as the ONNX file.

    Nothing a folder says is imported or called: quantizers are looked up by name among installed plugins.

    Raises:
        DataError: a file is missing, truncated or changed, or does not fit the model.
    """
    folder = Path(folder)
    if model is None:
        return _load_executable(folder)
    return _load_codes(codes_folder(folder), model if isinstance(model, nn.Module) else model())


def _load_executable(folder: Path) -> nn.Module:
    registry = PluginRegistry.load_installed()
    for artifact in _artifacts(folder):
        path = folder / str(artifact.get("path"))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"report.json of {folder} names {path}, which lies outside; do not trust this folder"
            )
        if not path.is_file() or artifact.get("exporter") not in registry.names("exporter"):
            continue
        if sha256(path) != artifact.get("sha256"):
            raise DataError(f"{path} is not the file report.json was written for; export the model again")
        module: nn.Module | None = registry.get("exporter", artifact["exporter"]).load(path)
        if module is not None:
            return module
    raise DataError(f"nothing in {folder} runs by itself; give the float model: qpipe.load(folder, model=…)")


def _artifacts(folder: Path) -> list[Mapping[str, Any]]:
    try:
        artifacts = json.loads((folder / "report.json").read_text())["artifacts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder} holds no report.json of a run; give the folder that out= named") from None
    return [artifact for artifact in artifacts if isinstance(artifact, dict)]


def _load_codes(folder: Path, model: nn.Module) -> nn.Module:
    manifest, tensors = read_codes(folder)
    model = model.eval()
    with fitting(folder, model):
        _take_structure(model, manifest, tensors)
        prepare(model, [example(manifest["call"])], _Example(), _recipe(manifest))
        restore(model, manifest, tensors)
    return model


class _Example(Task):
    """Feed the recorded call."""

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
        args, kwargs = batch
        return args, kwargs


@dataclass(frozen=True)
class _Recorded(Recipe):
    """The slots of another run, tensor by tensor."""

    slots: Mapping[tuple[str, Role], Slot] = field(default_factory=dict)

    def slot(self, name: str, role: Role) -> Slot | None:
        """Return what was used for a weight (by module path) or an edge (by name)."""
        return self.slots.get((name, role))


def _recipe(manifest: Mapping[str, Any]) -> _Recorded:
    registry = PluginRegistry.load_installed()
    slots = [_slot(described, registry) for described in manifest["slots"]]
    found = {(key.rpartition(".")[0], Role.WEIGHT): e["slot"] for key, e in manifest["weights"].items()}
    found |= {(name, Role.ACTIVATION): e["slot"] for name, e in manifest["edges"].items()}
    target: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in manifest["target"].items()
    }
    return _Recorded(
        None, None, Target(**target), slots={name: slots[index] for name, index in found.items()}
    )


def _slot(described: Mapping[str, Any], registry: PluginRegistry) -> Slot:
    kinds = ("quantizer", "calibrator", "granularity")
    for value in (value for kind in kinds for value in described[kind].values()):
        if not isinstance(value, PLAIN):
            raise DataError(f"the manifest constructs a method with {value!r}, which is no plain value")
    spec = QuantSpec(**{**described["spec"], "role": Role(described["spec"]["role"])})
    return Slot(**{kind: registry.create(kind, described[kind]) for kind in kinds}, spec=spec)


def _take_structure(model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Repeat what transforms did: a norm became Identity, a clip ranges, a layer a bias, a tie was cut."""
    modules = dict(model.named_modules())
    for name in manifest["identities"]:
        if type(modules[name]) is not nn.Identity:
            model.set_submodule(name, nn.Identity())
    for name in manifest["clips"]:
        model.set_submodule(name, ChannelClip(tensors[f"{name}.low"], tensors[f"{name}.high"]))
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        if path in modules and modules[path]._parameters.get(name, value) is None:
            modules[path].register_parameter(name, nn.Parameter(torch.empty_like(value), requires_grad=False))
    _untie(modules, tensors)


def _untie(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Part tied parameters that were stored apart: a tied one is stored once."""
    seen: set[nn.Parameter] = set()
    for key in tensors:
        path, _, name = key.rpartition(".")
        parameter = modules[path]._parameters.get(name) if path in modules else None
        if parameter in seen:
            modules[path].register_parameter(name, copy.deepcopy(parameter))
        if parameter is not None:
            seen.add(parameter)

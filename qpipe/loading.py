"""From a folder back to a working module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.artifact import CODES, FORMAT, MANIFEST, PLAIN, example, read_codes, sha256, state_key
from qpipe.errors import DataError, QpipeError
from qpipe.nn import ChannelClip, FakeQuant, QuantizedWeight, edge_quantizers, weight_quantizers
from qpipe.packing import packed_bytes, unpack
from qpipe.recipe import Recipe, Slot
from qpipe.registry import PluginRegistry
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
    return _load_codes(_codes_folder(folder), model if isinstance(model, nn.Module) else model())


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


def _codes_folder(folder: Path) -> Path:
    for path in (folder / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}"))):
        if path.is_file() and FORMAT in path.read_text(errors="replace"):
            return path.parent
    raise DataError(f"{folder} holds no stored codes ({MANIFEST}); export with exporter=[safetensors]")


def _load_codes(folder: Path, model: nn.Module) -> nn.Module:
    manifest, tensors = read_codes(folder)
    model = model.eval()
    try:
        _take_structure(model, manifest, tensors)
        prepare(model, [example(manifest["call"])], _Example(), _recipe(manifest))
        _check_names(model, manifest)
        _take_floats(model, tensors)
        _take_codes(model, tensors)
        _switch_off(model, manifest)
    except QpipeError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise DataError(
            f"{folder} does not fit {type(model).__name__} ({error}); give the model it was made from"
        ) from error
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
    """Repeat what transforms did: a normalization became Identity, a clip got ranges, a layer a bias."""
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


def _check_names(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    found = {
        "weight": {state_key(w) for w in weight_quantizers(model)},
        "edge": {e.name for e in edge_quantizers(model)},
    }
    for what, names in found.items():
        if different := sorted(names ^ set(manifest[f"{what}s"])):
            raise DataError(
                f"{what} '{different[0]}' is quantized either in {type(model).__name__} or as stored, "
                "not in both; give the model it was made from"
            )


def _take_floats(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    floats = {key: value for key, value in tensors.items() if not key.endswith(CODES)}
    absent, unknown = model.load_state_dict(floats, strict=False)
    for fake_quant in (m for m in model.modules() if isinstance(m, FakeQuant) and m.slot.spec.symmetric):
        fake_quant.zero_point = torch.zeros_like(fake_quant.scale)
    state = model.state_dict(keep_vars=True)
    given = {id(state[key]) for key in floats if key in state} | {
        id(w.parameter) for w in weight_quantizers(model)
    }
    lost = [key for key in absent if id(state[key]) not in given and not key.endswith(".zero_point")]
    if unknown or lost:
        raise DataError(
            f"the stored tensors and {type(model).__name__} do not have '{(unknown + lost)[0]}' in common; "
            "give the model it was made from"
        )


def _take_codes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    weights = weight_quantizers(model)
    stored = [weight for weight in weights if state_key(weight) + CODES in tensors]
    for weight in stored:
        _take_weight(weight, tensors[state_key(weight) + CODES])
    taken = {id(weight.parameter) for weight in stored}
    if lost := [weight.name for weight in weights if id(weight.parameter) not in taken]:
        raise DataError(f"the stored tensors hold no codes of '{lost[0]}'; export the model again")


@torch.no_grad()
def _take_weight(weight: QuantizedWeight, packed: Tensor) -> None:
    fake_quant, before = weight.fake_quant, weight.blocks_input()
    slot, qparams = fake_quant.slot, fake_quant.qparams()
    quantizer, spec = slot.quantizer, slot.spec
    blocks, num_bits = slot.granularity.to_blocks(before), quantizer.code_bits(spec)
    shape = (blocks.shape[0], quantizer.num_codes(blocks.shape[1]))
    num_codes = shape[0] * shape[1]
    if packed.dtype is not torch.uint8 or packed.numel() != packed_bytes(num_codes, num_bits):
        raise DataError(
            f"{packed.numel()} bytes hold no {num_codes} codes of {num_bits} bits of '{weight.name}'; "
            "give the model it was made from"
        )
    codes = unpack(packed, num_bits, num_codes).view(shape).to(torch.float32) + quantizer.code_min(spec)
    x = slot.granularity.from_blocks(quantizer.dequantize(codes, qparams, spec), before.shape)
    weight.write(x)
    # levels that rounding moves on (not every codebook is its own nearest) are kept as they were stored
    fake_quant.enabled = torch.equal(fake_quant(weight.blocks_input()), weight.blocks_input())


def _switch_off(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Leave in floating point what was left so; weights that were already hold their float values."""
    for edge in edge_quantizers(model):
        edge.enabled = bool(manifest["edges"][edge.name]["enabled"])

"""A quantized model as two files: tensors with packed codes, and a manifest that says what they are."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpipe.errors import DataError
from qpipe.nn import ChannelClip, FakeQuant, QuantizedWeight, edge_quantizers, weight_quantizers
from qpipe.packing import coded_weights, float_rest, pack
from qpipe.recipe import Recipe, Slot

FORMAT = "qpipe-codes"
MANIFEST, TENSORS = "manifest.json", "model.safetensors"
CODES = ".codes"
_VERSION = 1
PLAIN = (bool, int, float, str, type(None))


def write_codes(model: nn.Module, recipe: Recipe, call: tuple[Any, Any], folder: Path, about: str) -> None:
    """Write a calibrated model into folder, the manifest last.

    Args:
        call: (args, kwargs) of a forward; shapes and dtypes are stored, never values.
        about: what the float model is, for whoever has to give it to load.
    """
    tensors = {name: x.contiguous().cpu() for name, x in _tensors(model).items()}
    save_file(tensors, folder / TENSORS)
    slots: list[dict[str, Any]] = []
    manifest = {
        "format": FORMAT,
        "version": _VERSION,
        "qpipe": version("qpipe-quant"),
        "tensors": {"file": TENSORS, "sha256": sha256(folder / TENSORS)},
        "model": about,
        "call": _shapes(list(call)),
        "target": asdict(recipe.target),
        "identities": [name for name, module in model.named_modules() if type(module) is nn.Identity],
        "clips": [name for name, module in model.named_modules() if isinstance(module, ChannelClip)],
        "weights": {state_key(w): _entry(w.fake_quant, slots) for w in weight_quantizers(model)},
        "edges": {edge.name: _entry(edge, slots) for edge in edge_quantizers(model)},
        "slots": slots,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_codes(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest and the tensors of a folder that write_codes wrote.

    Raises:
        DataError: a file is missing, truncated, changed, or no such artifact.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); export the model again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} describes no quantized model; give the folder that exporter=safetensors wrote"
        )
    if manifest.get("version") != _VERSION:
        raise DataError(
            f"{path} has version {manifest.get('version')}, this qpipe reads {_VERSION}; export again"
        )
    file = folder / TENSORS  # whatever path the manifest names: it could lead out of the folder
    if not file.is_file() or sha256(file) != manifest.get("tensors", {}).get("sha256"):
        raise DataError(f"{file} is not the file its manifest was written for; export the model again")
    try:
        return manifest, load_file(file)
    except SafetensorError as error:
        raise DataError(f"{file} is damaged ({error}); export the model again") from None


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_key(weight: QuantizedWeight) -> str:
    """Return the state-dict key of a quantized parameter."""
    return weight.name.replace(":", ".")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return float_rest(model) | {state_key(weight) + CODES: _packed(weight) for weight in coded_weights(model)}


def _packed(weight: QuantizedWeight) -> Tensor:
    fake_quant = weight.fake_quant
    quantizer, spec = fake_quant.slot.quantizer, fake_quant.slot.spec
    codes = fake_quant.codes(weight.blocks_input()) - quantizer.code_min(spec)
    return pack(codes, quantizer.code_bits(spec))


def _entry(fake_quant: FakeQuant, slots: list[dict[str, Any]]) -> dict[str, Any]:
    slot = described(fake_quant.slot)
    if slot not in slots:
        slots.append(slot)
    return {"slot": slots.index(slot), "enabled": fake_quant.enabled}


def described(slot: Slot) -> dict[str, Any]:
    """Return a slot as plain data, the arguments of its parts with it."""
    parts = {kind: getattr(slot, kind) for kind in ("quantizer", "calibrator", "granularity")}
    described = {kind: {"name": part.name, **_arguments(part)} for kind, part in parts.items()}
    return described | {"spec": asdict(slot.spec)}


def _arguments(part: object) -> dict[str, Any]:
    """Return what a part was constructed with, as far as it kept it under the same names."""
    names = inspect.signature(type(part)).parameters
    values = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return {name: value for name, value in values.items() if isinstance(value, PLAIN)}


def _shapes(tree: Any) -> Any:  # noqa: ANN401  # a call's arguments
    if isinstance(tree, Tensor):
        return {"shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {"dict": {str(key): _shapes(value) for key, value in tree.items()}}
    if isinstance(tree, (list, tuple)):
        return {"list" if isinstance(tree, list) else "tuple": [_shapes(value) for value in tree]}
    return {"value": tree if isinstance(tree, PLAIN) else None}


def example(shapes: Mapping[str, Any]) -> Any:  # noqa: ANN401  # a call's arguments
    """Return arguments of the recorded shapes, filled with ones.

    Raises:
        DataError: the description is none of ours.
    """
    match shapes:
        case {"shape": list(shape), "dtype": str(name)} if isinstance(
            getattr(torch, name, None), torch.dtype
        ):
            return torch.ones(shape, dtype=getattr(torch, name))
        case {"dict": dict(items)}:
            return {key: example(value) for key, value in items.items()}
        case {"list": list(items)}:
            return [example(value) for value in items]
        case {"tuple": list(items)}:
            return tuple(example(value) for value in items)
        case {"value": value} if isinstance(value, PLAIN):
            return value
    raise DataError(f"the manifest describes an argument as {shapes}; export the model again")

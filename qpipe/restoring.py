"""What a folder of stored codes holds, put into a prepared model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.artifact import CODES, FORMAT, MANIFEST, described, read_codes, state_key
from qpipe.errors import DataError, QpipeError, RecipeError
from qpipe.nn import (
    ChannelClip,
    FakeQuant,
    QuantizedWeight,
    edge_quantizers,
    weight_name,
    weight_quantizers,
)
from qpipe.packing import packed_bytes, unpack
from qpipe.recipe import Recipe, Slot
from qpipe.types import Role


def codes_folder(folder: Path) -> Path:
    """Return the folder, itself or one in it, that holds stored codes.

    Raises:
        DataError: there is none.
    """
    for path in (folder / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}"))):
        if path.is_file() and FORMAT in path.read_text(errors="replace"):
            return path.parent
    raise DataError(f"{folder} holds no stored codes ({MANIFEST}); export with exporter=[safetensors]")


@contextmanager
def fitting(folder: Path, model: nn.Module) -> Iterator[None]:
    """Say in one sentence that a folder does not fit a model."""
    try:
        yield
    except QpipeError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise DataError(
            f"{folder} does not fit {type(model).__name__} ({error}); give the model it was made from"
        ) from error


def restore(model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Let a prepared model compute what the stored one did; weights become the values of their codes.

    Raises:
        DataError: they are not of the same model.
    """
    _check_names(model, manifest)
    _take_floats(model, tensors)
    for weight, codes in _stored(model, tensors):
        _take_weight(weight, codes)
    _switch_off(model, manifest)


@torch.no_grad()
def start_from(folder: Path, model: nn.Module) -> None:
    """Let a prepared, calibrated model go on from stored codes, quantized by the same words.

    It computes what the stored one did. A weight that rounds to its stored code keeps its float value, the
    others take the values of their codes.

    Raises:
        DataError: the folder is damaged or of another model.
        RecipeError: it was quantized by other words.
    """
    folder = codes_folder(folder)
    manifest, tensors = read_codes(folder)
    with fitting(folder, model):
        _check_names(model, manifest)
        placed = [
            (w.name, w.fake_quant.slot, manifest["weights"][state_key(w)]) for w in weight_quantizers(model)
        ]
        placed += [(e.name, e.slot, manifest["edges"][e.name]) for e in edge_quantizers(model)]
        _check_slots(folder, placed, manifest)
        _take_floats(model, tensors)
        for weight, codes in _stored(model, tensors):
            _approach(weight, codes)
        _switch_off(model, manifest)


def _approach(weight: QuantizedWeight, codes: Tensor) -> None:
    fake_quant, before = weight.fake_quant, weight.blocks_input()
    granularity = fake_quant.slot.granularity
    blocks, values = granularity.to_blocks(before), _values(weight, codes)
    same = fake_quant.codes(before) == codes
    same = same.repeat_interleave(blocks.shape[1] // codes.shape[1], 1)
    weight.write(granularity.from_blocks(torch.where(same, blocks, values), before.shape))


def check_start(folder: Path, model: nn.Module, recipe: Recipe, slots_stay: bool = True) -> None:
    """Refuse stored codes that no training of this run can start from, as far as it shows without data.

    Args:
        model: before transforms.
        slots_stay: whether tensors will be quantized as the recipe says; not where a strategy changes that.

    Raises:
        RecipeError: they are damaged, or of another model, other transforms or other words.
    """
    with _as_recipe_error(folder):
        folder = codes_folder(folder)
        manifest, _ = read_codes(folder)
        with fitting(folder, model):
            _check_transforms(folder, model, manifest, recipe)
            if slots_stay:
                _check_slots(folder, _asked(folder, manifest, recipe), manifest)


def check_placed(folder: Path, model: nn.Module) -> None:
    """Refuse stored codes of other weights or edges than those of a prepared model.

    Raises:
        RecipeError: names the first that differs.
    """
    with _as_recipe_error(folder):
        folder = codes_folder(folder)
        manifest, tensors = read_codes(folder)
        with fitting(folder, model):
            _check_names(model, manifest, "start with the model, target and words of the run that stored it")
            _check_floats(model, tensors)


@contextmanager
def _as_recipe_error(folder: Path) -> Iterator[None]:
    """Blame the word that names the folder."""
    try:
        yield
    except DataError as error:
        raise RecipeError(f"artifact={folder}: {error}") from None


def _check_transforms(folder: Path, model: nn.Module, manifest: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a model that lacks what was stored, or has what a transform had taken out."""
    modules = dict(model.named_modules())
    for key in manifest["weights"]:
        path, _, name = key.rpartition(".")
        if path not in modules or name not in modules[path]._parameters:
            raise DataError(f"'{key}' was stored, which {type(model).__name__} does not have; give its model")
    taken_out = [*manifest["identities"], *manifest["clips"]]
    changed = [name for name in taken_out if type(modules.get(name)) not in (nn.Identity, ChannelClip)]
    if changed and not recipe.transforms:
        raise RecipeError(
            f"'{changed[0]}' was taken out by a transform before {folder} was stored, and this run has "
            "transform=[]; start with the words of the run that stored it"
        )


def _asked(
    folder: Path, manifest: Mapping[str, Any], recipe: Recipe
) -> Iterator[tuple[str, Slot, Mapping[str, Any]]]:
    """Yield what the recipe says of every stored weight and edge: name, slot, the manifest's entry."""
    named = [
        (weight_name(*_split(key)), _split(key)[0], Role.WEIGHT, e) for key, e in manifest["weights"].items()
    ]
    named += [(name, name, Role.ACTIVATION, entry) for name, entry in manifest["edges"].items()]
    for name, known_as, role, entry in named:
        slot = recipe.slot(known_as, role)
        if slot is None:
            raise RecipeError(
                f"'{name}' was quantized when {folder} was stored, and this run leaves it in floating point; "
                "start with the words of the run that stored it"
            )
        yield name, slot, entry


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.rpartition(".")
    return path, name


def _check_slots(
    folder: Path, placed: Iterable[tuple[str, Slot, Mapping[str, Any]]], manifest: Mapping[str, Any]
) -> None:
    """Refuse other levels or blocks; how ranges were found may differ.

    Args:
        placed: name, slot, and the manifest's entry of each weight and edge.
    """
    for name, slot, entry in placed:
        ours, stored = described(slot), manifest["slots"][entry["slot"]]
        for part in ("quantizer", "granularity", "spec"):
            for key in sorted({*ours[part], *stored[part]} - {"rounding"}, key=lambda k: (k != "name", k)):
                here, there = ours[part].get(key), stored[part].get(key)
                if here != there:
                    word = key if part == "spec" else part if key == "name" else f"{part}.{key}"
                    raise RecipeError(
                        f"'{name}' was stored in {folder} with {word}={there}, and this run has "
                        f"{here}; start with the words of the run that stored it"
                    )


def _check_names(
    model: nn.Module, manifest: Mapping[str, Any], advice: str = "give the model it was made from"
) -> None:
    found = {
        "weight": {state_key(w) for w in weight_quantizers(model)},
        "edge": {e.name for e in edge_quantizers(model)},
    }
    for what, names in found.items():
        if different := sorted(names ^ set(manifest[f"{what}s"])):
            raise DataError(
                f"{what} '{different[0]}' is quantized either here or as stored, not in both; {advice}"
            )


def _check_floats(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that the model does not have, or has in another shape; quantizers' own come later."""
    state = model.state_dict()
    own = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FakeQuant))
    for key, value in tensors.items():
        if key.endswith(CODES) or key.startswith(own):
            continue
        ours = list(state[key].shape) if key in state else "none"
        if ours != list(value.shape):
            raise DataError(
                f"'{key}' is stored with shape {list(value.shape)}, the model here has {ours}; "
                "give the model it was made from, after the same transforms"
            )


def _take_floats(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    floats = {key: value for key, value in tensors.items() if not key.endswith(CODES)}
    absent, unknown = model.load_state_dict(floats, strict=False)
    for fake_quant in (m for m in model.modules() if isinstance(m, FakeQuant) and m.slot.spec.symmetric):
        fake_quant.zero_point = fake_quant.scale.new_zeros(1, 1)
    state = model.state_dict(keep_vars=True)
    given = {id(state[key]) for key in floats if key in state} | {
        id(w.parameter) for w in weight_quantizers(model)
    }
    lost = [key for key in absent if id(state[key]) not in given and not key.endswith(".zero_point")]
    if unknown or lost:
        raise DataError(
            f"the stored tensors and {type(model).__name__} do not have '{(unknown + lost)[0]}' in common; "
            "give the model it was made from, after the same transforms"
        )


def _stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[QuantizedWeight, Tensor]]:
    """Return weights with their stored codes [B, num_codes]; one of each tied group."""
    weights = weight_quantizers(model)
    stored = [weight for weight in weights if state_key(weight) + CODES in tensors]
    taken = {id(weight.parameter) for weight in stored}
    if lost := [weight.name for weight in weights if id(weight.parameter) not in taken]:
        raise DataError(f"the stored tensors hold no codes of '{lost[0]}'; export the model again")
    return [(weight, _unpacked(weight, tensors[state_key(weight) + CODES])) for weight in stored]


def _unpacked(weight: QuantizedWeight, packed: Tensor) -> Tensor:
    slot = weight.fake_quant.slot
    quantizer, spec = slot.quantizer, slot.spec
    blocks, num_bits = slot.granularity.to_blocks(weight.blocks_input()), quantizer.code_bits(spec)
    shape = (blocks.shape[0], quantizer.num_codes(blocks.shape[1]))
    num_codes = shape[0] * shape[1]
    if packed.dtype is not torch.uint8 or packed.numel() != packed_bytes(num_codes, num_bits):
        raise DataError(
            f"{packed.numel()} bytes hold no {num_codes} codes of {num_bits} bits of '{weight.name}'; "
            "give the model it was made from"
        )
    return unpack(packed, num_bits, num_codes).view(shape).to(torch.float32) + quantizer.code_min(spec)


def _values(weight: QuantizedWeight, codes: Tensor) -> Tensor:
    """Return what codes stand for, as blocks [B, N]."""
    slot = weight.fake_quant.slot
    return slot.quantizer.dequantize(codes, weight.fake_quant.qparams(), slot.spec)


@torch.no_grad()
def _take_weight(weight: QuantizedWeight, codes: Tensor) -> None:
    fake_quant, shape = weight.fake_quant, weight.blocks_input().shape
    weight.write(fake_quant.slot.granularity.from_blocks(_values(weight, codes), shape))
    # levels that rounding moves on (not every codebook is its own nearest) are kept as they were stored
    fake_quant.enabled = torch.equal(fake_quant(weight.blocks_input()), weight.blocks_input())


def _switch_off(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Leave in floating point what was left so; weights that were already hold their float values."""
    for edge in edge_quantizers(model):
        edge.enabled = bool(manifest["edges"][edge.name]["enabled"])

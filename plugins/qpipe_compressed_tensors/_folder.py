"""A model of transformers as a folder of packed codes: config.json says how, model.safetensors holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qpipe import DataError, RecipeError
from qpipe.artifact import sha256
from qpipe.nn import QuantizedWeight, weight_quantizers

CONFIG, TENSORS = "config.json", "model.safetensors"
_ELSEWHERE = "transformers_weights"  # what transformers reads instead, whatever the digest says
_OURS = "qpipe"  # our note in config.json


def write(simulation: nn.Module, config: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:  # noqa: ANN401
    """Write a prepared, calibrated model and its configuration; all but matrices of linear layers are floats.

    Returns:
        the quantization_config, and the quantized weights that are stored as the reals their codes mean.
    """
    state, floats, schemes = _tensors(simulation)
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    linear = [name for name, module in simulation.named_modules() if isinstance(module, nn.Linear)]
    about = _quantization_config(schemes, [name for name in linear if name not in schemes])
    config.save_pretrained(folder)
    described = json.loads((folder / CONFIG).read_text())
    described |= {"quantization_config": about, "dtype": "float32"}
    described[_OURS] = {TENSORS: sha256(folder / TENSORS)}
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    return about, floats


def read(folder: Path) -> nn.Module:
    """Return the model transformers makes of a folder; no code of the folder is run.

    Raises:
        DataError: a file is missing or changed, or names no class of transformers.
    """
    import transformers

    try:
        described = json.loads((folder / CONFIG).read_text())
        name, digest = described["architectures"][0], described[_OURS][TENSORS]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{folder / CONFIG} was not written by exporter compressed_tensors ({error})"
        ) from None
    if elsewhere := described.get(_ELSEWHERE):
        raise DataError(
            f"{folder / CONFIG} reads weights from another file ('{elsewhere}'), which this exporter never "
            "writes; do not trust it"
        )
    if not (folder / TENSORS).is_file() or sha256(folder / TENSORS) != digest:
        raise DataError(f"{folder / TENSORS} is not the file {CONFIG} was written for; export again")
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise DataError(f"{folder / CONFIG} names the architecture '{name}', which transformers has not")
    model: nn.Module = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval()


def _tensors(simulation: nn.Module) -> tuple[dict[str, Tensor], list[str], dict[str, Mapping[str, Any]]]:
    quantized = {weight.name.replace(":", "."): weight for weight in weight_quantizers(simulation)}
    tied = _tied(simulation)
    state: dict[str, Tensor] = {}
    floats: list[str] = []
    schemes: dict[str, Mapping[str, Any]] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in simulation.state_dict().items():
        if (
            "_quantizer." in key
            or "activation_quantizers." in key
            or (tensor.data_ptr(), tensor.shape) in seen
        ):
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        weight = quantized.get(key)
        if weight is None or not weight.fake_quant.enabled:
            state[key] = tensor
        elif isinstance(weight.module, nn.Linear) and key not in tied:
            path = key.removesuffix(".weight")
            packed, schemes[path] = _packed(weight)
            state |= {f"{path}.{name}": x for name, x in packed.items()}
        else:
            state[key] = weight.fake_quant(weight.blocks_input())
            floats.append(key)
    return {key: x.detach().cpu().contiguous().clone() for key, x in state.items()}, floats, schemes


def _tied(model: nn.Module) -> set[str]:
    """Return the keys of parameters that several modules share."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _packed(weight: QuantizedWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and scheme of one matrix [O, I]: codes in int32 words, a scale for each block."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    fake_quant, x = weight.fake_quant, weight.blocks_input()
    slot, qparams = fake_quant.slot, fake_quant.qparams()
    spec, rows = slot.spec, x.shape[0]
    blocks = fake_quant.codes(x)
    if len(blocks) % rows or blocks.shape[1] * (len(blocks) // rows) != x.shape[1]:
        raise RecipeError(
            f"the blocks of '{weight.name}' [{rows}, {x.shape[1]}] are not equal parts of its rows; use "
            "weight.granularity=channel, or subchannel with a group_size that divides its inputs"
        )
    codes = slot.granularity.from_blocks(blocks, x.shape).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, spec.num_bits),
        "weight_scale": qparams.scale.reshape(rows, -1).float(),
        "weight_shape": torch.tensor(x.shape),
    }
    strategy = (
        {"strategy": "channel"}
        if len(blocks) == rows
        else {"strategy": "group", "group_size": blocks.shape[1]}
    )
    return tensors, {"num_bits": spec.num_bits, "type": "int", "symmetric": True, **strategy}


def _quantization_config(schemes: Mapping[str, Mapping[str, Any]], ignore: list[str]) -> dict[str, Any]:
    """Say which layers are how; one scheme for all is said of the class, as other tools do."""
    distinct = [dict(scheme) for scheme in {json.dumps(s): s for s in schemes.values()}.values()]
    groups = {}
    for index, scheme in enumerate(distinct):
        names = [name for name, other in schemes.items() if dict(other) == scheme]
        targets = ["Linear"] if len(distinct) == 1 else names
        groups[f"group_{index}"] = {"targets": targets, "weights": scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }

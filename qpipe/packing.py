"""Codes packed to their true bits, and how many bytes a quantized model takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe import nn as qnn


def packed_bytes(num_codes: int, num_bits: int) -> int:
    """Return how many bytes num_codes codes of num_bits take."""
    return (num_codes * num_bits + 7) // 8


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes 0 .. 2^num_bits - 1 of any shape into uint8 [packed_bytes].

    Eight codes fill num_bits bytes, the first code in the lowest bits. Above eight bits (sixteen at most) the
    low bytes of all codes come first, then the remaining bits, packed likewise.
    """
    codes = codes.flatten().to(torch.int64)
    if num_bits > 8:
        return torch.cat([pack(codes & 255, 8), pack(codes >> 8, num_bits - 8)])
    eights = F.pad(codes, (0, -codes.numel() % 8)).view(-1, 8)
    words = (eights << num_bits * torch.arange(8, device=codes.device)).sum(-1, keepdim=True)
    octets = (words >> 8 * torch.arange(num_bits, device=codes.device)) & 255
    return octets.to(torch.uint8).flatten()[: packed_bytes(codes.numel(), num_bits)]


def unpack(packed: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Undo pack: uint8 [packed_bytes] -> int64 [num_codes]."""
    if num_bits > 8:
        low, high = packed[:num_codes], packed[num_codes:]
        return unpack(low, 8, num_codes) | unpack(high, num_bits - 8, num_codes) << 8
    octets = F.pad(packed.to(torch.int64), (0, -packed.numel() % num_bits)).view(-1, num_bits)
    words: Tensor = (octets << 8 * torch.arange(num_bits, device=packed.device)).sum(-1, keepdim=True)
    codes: Tensor = (words >> num_bits * torch.arange(8, device=packed.device)) & (2**num_bits - 1)
    return codes.flatten()[:num_codes]


def payload_bytes(model: nn.Module) -> int:
    """Return the bytes of tensors a prepared, calibrated model takes when its codes are packed.

    Shared tensors count once; what stays in floating point counts in its own dtype.
    """
    return sum(_code_bytes(weight) for weight in coded_weights(model)) + sum(
        tensor.nbytes for tensor in float_rest(model).values()
    )


def coded_weights(model: nn.Module) -> list[qnn.QuantizedWeight]:
    """Return the weights stored as codes; one of each tied group that shares its quantizer's parameters."""
    found: dict[tuple[object, ...], qnn.QuantizedWeight] = {}
    for weight in qnn.weight_quantizers(model):
        parameter = weight.module._parameters[weight.parameter_name]
        found.setdefault((id(parameter), *_identity(weight.fake_quant)), weight)
    return list(found.values())


def float_rest(model: nn.Module) -> dict[str, Tensor]:
    """Return every other tensor of the state, by key, shared storage once: biases, norms, qparams.

    The zero points of symmetric quantizers are all 0 and left out.
    """
    coded = {id(weight.module._parameters[weight.parameter_name]) for weight in qnn.weight_quantizers(model)}
    implied = {
        f"{name}.zero_point"
        for name, m in model.named_modules(remove_duplicate=False)  # tied weights share one
        if isinstance(m, qnn.FakeQuant) and m.slot.spec.symmetric
    }
    found: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in coded and key not in implied:
            found.setdefault(_storage(key, tensor), (key, tensor.detach()))
    return dict(found.values())


def _code_bytes(weight: qnn.QuantizedWeight) -> int:
    slot = weight.fake_quant.slot
    blocks = slot.granularity.to_blocks(weight.blocks_input())
    num_codes = blocks.shape[0] * slot.quantizer.num_codes(blocks.shape[1])
    return packed_bytes(num_codes, slot.quantizer.code_bits(slot.spec))


def _identity(fake_quant: qnn.FakeQuant) -> tuple[object, ...]:
    return (
        fake_quant.slot,
        tuple(fake_quant.scale.flatten().tolist()),
        tuple(fake_quant.zero_point.flatten().tolist()),
    )


def _storage(key: str, tensor: Tensor) -> tuple[object, ...]:
    shared = tensor.data_ptr() if tensor.numel() else key
    return shared, tensor.shape, tensor.stride(), tensor.dtype

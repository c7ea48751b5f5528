"""Weights whose levels no integer engine multiplies by: packed codes, and what each code stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.errors import RecipeError
from qpipe.nn import FakeQuant
from qpipe.packing import pack, unpack
from qpipe.recipe import Slot

MAX_BITS = 8  # of a code that is looked up in a table
_SAMPLE = 512  # blocks in which common patterns are looked for
_CLOSE = 2e-6  # of a block's largest level: float32 sums in another order
_DISTINCT = 256  # coefficients that a byte tells apart


class TabledWeight(nn.Module):
    """Hold a weight's codes packed to their bits and decode them; stands where its quantizer stood.

    Any quantizer whose codes each stand for reals of their own is decoded alike. Where the levels of every
    block are the same few patterns times coefficients of the block (one: a scale; several: a sum of signs),
    those are stored; else the table of each block.

    Args:
        x: the weight, output channels first.

    Raises:
        RecipeError: codes of more than 8 bits, or what a code stands for depends on others.
    """

    codes: Tensor  # uint8 [groups of eight, num_bits]
    patterns: Tensor  # [2^num_bits, R], or [B * 2^num_bits, dim] where each block has its own table
    coefficients: Tensor  # [B, R]; the distinct ones where index says which; or none
    index: Tensor  # of B * R coefficients, packed like codes of 8 bits; or none

    def __init__(self, fake_quant: FakeQuant, x: Tensor) -> None:
        super().__init__()
        slot, qparams = fake_quant.slot, fake_quant.qparams()
        if reason := reason_no_table(slot):
            raise RecipeError(f"'{fake_quant.name}': {reason}")
        self.granularity, self.shape = slot.granularity, x.shape
        self.num_bits = slot.quantizer.code_bits(slot.spec)
        codes = fake_quant.codes(x.detach())
        self.sizes = codes.shape
        self.register_buffer("codes", _packed(codes - slot.quantizer.code_min(slot.spec), self.num_bits))
        reals, table = slot.quantizer.dequantize(codes, qparams, slot.spec), _Table(fake_quant, codes)
        for tensors in (table.factored(), table.whole()):
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)
            difference = (self.decoded() - reals).abs()
            if (difference <= _CLOSE * reals.abs().amax(1, keepdim=True)).all():
                return
        raise RecipeError(
            f"what a code of quantizer '{slot.quantizer.name}' stands for ('{fake_quant.name}') depends on "
            "the codes beside it, so no table holds it; use another quantizer, or exporter=safetensors"
        )

    def forward(self, _: Tensor | None) -> Tensor:
        """Return the weight, output channels first."""
        return self.granularity.from_blocks(self.decoded(), self.shape)

    def decoded(self) -> Tensor:
        """Return the reals [B, N] the codes stand for."""
        codes = self.unpacked(self.codes, self.num_bits, self.sizes.numel()).view(self.sizes)
        if not self.coefficients.numel():
            first = torch.arange(len(codes), device=codes.device).unsqueeze(1) << self.num_bits
            return F.embedding(codes + first, self.patterns).flatten(1)
        values, rank = self.coefficients, self.patterns.shape[1]
        if self.index.numel():
            values = F.embedding(self.unpacked(self.index, 8, len(codes) * rank), values.unsqueeze(1))
        return (F.embedding(codes, self.patterns) * values.view(-1, 1, rank)).sum(-1)

    def unpacked(self, packed: Tensor, num_bits: int, count: int) -> Tensor:
        """Undo the packing; an engine may put its own operation in the place of this one."""
        return unpack(packed.flatten(), num_bits, count)


def reason_no_table(slot: Slot) -> str | None:
    """Say in one sentence why codes of weights cannot be looked up in a table, or None."""
    num_bits = slot.quantizer.code_bits(slot.spec)
    if num_bits <= MAX_BITS:
        return None
    return (
        f"codes of quantizer '{slot.quantizer.name}' are looked up in tables, which hold those of at most "
        f"{MAX_BITS} bits; use weight.num_bits={MAX_BITS} or less, not {num_bits}"
    )


def precision(model: nn.Module) -> dict[str, str]:
    """Say for the proof what becomes of weights that are looked up, {} where a converted model has none."""
    bits = sorted({module.num_bits for module in model.modules() if isinstance(module, TabledWeight)})
    return (
        {"precision": f"weights stored in {', '.join(map(str, bits))} bits, computed in float32"}
        if bits
        else {}
    )


class _Table:
    """What codes [B, N] stand for, read from the quantizer itself; a code that does not occur, anything."""

    def __init__(self, fake_quant: FakeQuant, codes: Tensor) -> None:
        slot = fake_quant.slot
        self.quantizer, self.spec, self.qparams = slot.quantizer, slot.spec, fake_quant.qparams()
        self.num_blocks = len(codes)
        every = torch.arange(1 << self.quantizer.code_bits(self.spec), device=codes.device)
        self.codes = (every.to(codes.dtype) + self.quantizer.code_min(self.spec)).clamp(
            codes.min(), codes.max()
        )

    def levels(self, codes: Tensor, step: int = 1) -> Tensor:
        """Return what the codes [K] stand for in each block, or in one of so many: [B, K * dim]."""
        rows = slice(0, self.num_blocks, step)
        qparams = self.quantizer.rows(self.qparams, rows) if step > 1 else self.qparams
        codes = codes.expand(len(range(self.num_blocks)[rows]), -1)
        return self.quantizer.dequantize(codes, qparams, self.spec)

    def whole(self) -> dict[str, Tensor]:
        """Return every block's own table."""
        table = self.levels(self.codes).reshape(self.num_blocks * len(self.codes), -1)
        return {"patterns": table.contiguous(), "coefficients": table[:0, 0], "index": table[:0, 0].byte()}

    def factored(self) -> dict[str, Tensor]:
        """Return patterns [L, R] and coefficients [B, R], with an index where few differ; else the whole."""
        some = self.levels(self.codes, max(1, self.num_blocks // _SAMPLE)).double()
        if some.shape[1] != len(self.codes):  # a code stands for several reals
            return self.whole()
        some = some / some.abs().amax(1, keepdim=True).clamp(min=1e-300)
        columns = _independent(some) or [0]
        if 2 * len(columns) > len(self.codes) and self.num_blocks > 1:
            return self.whole()
        patterns = torch.linalg.lstsq(some[:, columns].cpu(), some.cpu(), driver="gelsd").solution.T
        coefficients = self.levels(self.codes[columns]).contiguous()
        values, index = torch.unique(coefficients, return_inverse=True)
        if len(values) > _DISTINCT or coefficients.numel() < 4 * len(values):
            values, index = coefficients, index.flatten()[:0]
        patterns = patterns.to(coefficients).contiguous()
        return {"patterns": patterns, "coefficients": values, "index": _packed(index, 8)}


def _packed(codes: Tensor, num_bits: int) -> Tensor:
    """Return uint8 [groups of eight codes, num_bits]."""
    packed = pack(codes, num_bits)
    return F.pad(packed, (0, -len(packed) % num_bits)).view(-1, num_bits)


def _independent(x: Tensor) -> list[int]:
    """Return columns of x [B, L] of which all others are sums, the largest first."""
    columns: list[int] = []
    while len(columns) < x.shape[1] and x.abs().max() > _CLOSE:
        columns.append(int(x.square().sum(0).argmax()))
        direction = F.normalize(x[:, columns[-1]], dim=0)
        x = x - direction.unsqueeze(1) * (direction @ x)
    return columns

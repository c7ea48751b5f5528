"""From fake-quantizers to integer codes and the operations engines know."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import nn as qnn
from qpipe.errors import RecipeError
from qpipe.kinds.granularity import Granularity
from qpipe.recipe import Slot
from qpipe.sharing import shared_copy
from qpipe.tables import TabledWeight, reason_no_table
from qpipe.types import QParams, QuantSpec, Role


def convert(model: nn.Module, dynamic: bool = False, tables: bool = False) -> nn.Module:
    """Return a copy of a prepared, calibrated model that computes with integer codes.

    Weights become integer buffers behind `quantized_decomposed.dequantize_*`, their float parameters are
    dropped; activations pass `quantize_per_tensor` and `dequantize_per_tensor`. Engines are given this graph.
    Where activations are codes too, weights of less than 8 bits lose their zero points: see CodedWeight.

    Args:
        dynamic: let a DynamicActivation stand where ranges are taken from each tensor; else they are refused.
        tables: let a TabledWeight stand where levels are not scale * (code - zero_point); else refused.

    Raises:
        RecipeError: codes are not scale * (code - zero_point), or a range is dynamic.
    """
    # registers torch.ops.quantized_decomposed, which nothing else in torch does
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    dropped = [
        w.parameter for w in qnn.weight_quantizers(model) if w.fake_quant.enabled and w.parameter is not None
    ]
    model = shared_copy(model, same=dropped).eval()
    weights = [weight for weight in qnn.weight_quantizers(model) if weight.fake_quant.enabled]
    centred = any(edge.enabled for edge in qnn.edge_quantizers(model))
    stand_ins = {id(weight.fake_quant): _weight(weight, tables, centred) for weight in weights}
    for weight in weights:
        weight.module._parameters[weight.parameter_name] = None
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, qnn.FakeQuant) and child.enabled:
                setattr(parent, name, stand_ins.get(id(child)) or _activation(child, dynamic))
    return model


def _weight(weight: qnn.QuantizedWeight, tables: bool, centred: bool) -> nn.Module:
    slot = weight.fake_quant.slot
    if tables and not slot.quantizer.is_affine(slot.spec):
        return TabledWeight(weight.fake_quant, weight.blocks_input())
    return CodedWeight(weight.fake_quant, weight.blocks_input(), centred)


def _activation(fake_quant: qnn.FakeQuant, dynamic: bool) -> nn.Module:
    if dynamic and fake_quant.slot.spec.dynamic:
        return DynamicActivation(fake_quant)
    return CodedActivation(fake_quant)


class CodedWeight(nn.Module):
    """Hold a weight's codes and return the reals they stand for; stands where its quantizer stood.

    Args:
        x: the weight, output channels first.
        centred: take zero points out of codes of less than 8 bits. What is left fits int8, which engines
            multiply without a zero point: asymmetric weights cost nothing to run.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, fake_quant: qnn.FakeQuant, x: Tensor, centred: bool = False) -> None:
        super().__init__()
        qparams, granularity = _affine(fake_quant), fake_quant.slot.granularity
        self.granularity, self.spec, self.shape = granularity, fake_quant.slot.spec, x.shape
        codes = fake_quant.codes(x.detach())
        if centred and self.spec.num_bits < 8 and qparams.zero_point.any():
            codes = codes - qparams.zero_point
            qparams = QParams(qparams.scale, torch.zeros_like(qparams.zero_point))
            self.spec = QuantSpec(num_bits=8, symmetric=True, signed=True)
        rows = _by_channel(qparams, granularity, codes, x.shape)
        self.blocked = rows is None  # a channel has several scales: codes stay blocks [B, N]
        if rows is not None:
            codes, qparams = granularity.from_blocks(codes, x.shape), rows
        self.register_buffer("codes", codes.to(code_dtype(self.spec)).contiguous())
        self.register_buffer("scale", qparams.scale.flatten())
        self.register_buffer("zero_point", qparams.zero_point.flatten().to(torch.int64))
        self.scalars = (float(self.scale[0]), int(self.zero_point[0])) if self.scale.numel() == 1 else None

    def forward(self, _: Tensor | None) -> Tensor:
        """Return the weight, output channels first."""
        limits = (self.spec.quant_min, self.spec.quant_max, self.codes.dtype)
        ops = torch.ops.quantized_decomposed
        if self.scalars is not None:
            x: Tensor = ops.dequantize_per_tensor(self.codes, *self.scalars, *limits)
        else:
            x = ops.dequantize_per_channel(self.codes, self.scale, self.zero_point, 0, *limits)
        return self.granularity.from_blocks(x, self.shape) if self.blocked else x


class CodedActivation(nn.Module):
    """Quantize and dequantize an activation with one scale; stands where its quantizer stood."""

    def __init__(self, fake_quant: qnn.FakeQuant) -> None:
        super().__init__()
        qparams, spec = _affine(fake_quant), fake_quant.slot.spec
        if qparams.scale.numel() != 1:
            raise RecipeError(
                f"'{fake_quant.name}' has {qparams.scale.numel()} scales, integer engines take one; "
                "use activation.granularity=layer or channel"
            )
        self.name = fake_quant.name
        self.scale, self.zero_point = float(qparams.scale), int(qparams.zero_point)
        self.limits: tuple[Any, ...] = (spec.quant_min, spec.quant_max, code_dtype(spec))

    def forward(self, x: Tensor) -> Tensor:
        """Round x to its levels."""
        if not x.is_floating_point():
            return x
        ops = torch.ops.quantized_decomposed
        codes = ops.quantize_per_tensor(x, self.scale, self.zero_point, *self.limits)
        result: Tensor = ops.dequantize_per_tensor(codes, self.scale, self.zero_point, *self.limits)
        return result


class DynamicActivation(nn.Module):
    """Round an activation to levels fitted to itself; stands where its quantizer stood.

    An engine that has an operation for it puts that in the place of `forward`.
    """

    def __init__(self, fake_quant: qnn.FakeQuant) -> None:
        super().__init__()
        self.name = fake_quant.name
        self.fake_quant = fake_quant

    @property
    def per_token(self) -> bool:
        """Whether each row of features has its own scale."""
        return self.fake_quant.slot.granularity.dynamic_only

    def steps(self, x: Tensor) -> Tensor:
        """Return the scale of each element of x."""
        granularity = self.fake_quant.slot.granularity
        scale = self.fake_quant.dynamic_qparams(x).scale
        return granularity.from_blocks(scale.expand_as(granularity.to_blocks(x)), x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Round x to its levels."""
        rounded: Tensor = self.fake_quant(x)
        return rounded


def reason_not_affine(role: Role, slot: Slot, tables: bool = False) -> str | None:
    """Say in one sentence why no integer engine takes these levels and what to do, or None.

    Args:
        tables: of convert.
    """
    if slot.quantizer.is_affine(slot.spec):
        return None
    if tables and role is Role.WEIGHT:
        return reason_no_table(slot)
    instead = {
        Role.WEIGHT: ", or exporter=onnx, which stores such weights packed and computes in float32",
        Role.ACTIVATION: ", or activation=null to quantize weights alone",
    }
    return (
        f"the levels of quantizer '{slot.quantizer.name}' ({role.value}s) are not "
        f"scale * (code - zero_point); use {role.value}.quantizer=uniform{instead[role]}"
    )


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """Return the smallest integer dtype that holds the codes."""
    if spec.num_bits <= 8:
        return torch.int8 if spec.signed else torch.uint8
    return torch.int16 if spec.signed else torch.uint16


def _affine(fake_quant: qnn.FakeQuant) -> QParams:
    slot, qparams = fake_quant.slot, fake_quant.qparams()
    if slot.spec.dynamic:
        raise RecipeError(
            f"the range of '{fake_quant.name}' is dynamic; set activation.dynamic=false to convert it"
        )
    if not slot.quantizer.is_affine(slot.spec) or not torch.equal(
        qparams.zero_point, qparams.zero_point.round()
    ):
        raise RecipeError(
            f"quantizer '{slot.quantizer.name}' of '{fake_quant.name}' is not scale * (code - zero_point); "
            "no integer engine executes it"
        )
    return qparams


def _by_channel(
    qparams: QParams, granularity: Granularity, codes: Tensor, shape: torch.Size
) -> QParams | None:
    """Return qparams as one scale for the tensor or one a channel, or None where a channel has several."""
    if qparams.scale.numel() == 1:
        return qparams
    scale, zero_point = (
        granularity.from_blocks(x.expand_as(codes), shape).flatten(1)
        for x in (qparams.scale, qparams.zero_point)
    )
    if not (scale == scale[:, :1]).all() or not (zero_point == zero_point[:, :1]).all():
        return None
    return QParams(scale[:, :1], zero_point[:, :1])

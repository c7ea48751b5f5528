"""Run an integer program: sums, products, shifts and comparisons of integers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpipe import DataError
from qpipe_methods.integer.dyadic import rescale
from qpipe_methods.integer.program import Program, Step

_Tensors = dict[str, Tensor]
_Operation = Callable[[list[Tensor], dict[str, Any], _Tensors], Tensor]


class IntegerModule(nn.Module):
    """Compute a network on integer codes; a reference for other implementations, not made for speed.

    Reals are rounded to codes at the input; codes or sums are multiplied by their unit at the output.

    Args:
        accumulator: of sums; int64 shows whether int32 would have been too narrow.
    """

    def __init__(self, program: Program, accumulator: torch.dtype = torch.int32) -> None:
        super().__init__()
        if unknown := sorted({step.op for step in program.steps} - _OPERATIONS.keys()):
            raise DataError(f"the integer program uses operation '{unknown[0]}', unknown to this qpipe")
        self.program = program
        self.accumulator = accumulator

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return what the model returns.

        Raises:
            DataError: shapes do not fit one another: of another input than the model's, or of a broken file.
        """
        keyword = self.program.keyword
        x = next(iter(args), None) if keyword is None else kwargs.get(keyword)
        if x is None:
            raise DataError(f"the integer program takes '{keyword or 'its input'}', which this call lacks")
        try:
            return self._reals(self.values(x)).to(x.device)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"an input of shape {[*x.shape]} does not pass the integer program ({error}); give it what "
                "the model takes"
            ) from error

    @torch.no_grad()
    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Return every value of the program by name; 'input' holds the codes of x."""
        codes = self.program.input
        rounded = torch.round(x.detach().cpu() * (1.0 / codes.scale)) + codes.zero_point
        values = {"input": rounded.clamp(codes.low, codes.high).to(self.accumulator)}
        for step in self.program.steps:
            values[step.output] = self._result(step, [values[name] for name in step.inputs])
        return values

    def _result(self, step: Step, inputs: list[Tensor]) -> Tensor:
        tensors = {role: self.program.tensors[key] for role, key in step.tensors.items()}
        if not step.zero_points:
            return _OPERATIONS[step.op](inputs, step.args, tensors)
        centred = [x - zero_point for x, zero_point in zip(inputs, step.zero_points, strict=True)]
        operands = {role: tensors[role].to(self.accumulator) for role in _OPERANDS if role in tensors}
        result = _OPERATIONS[step.op](centred, step.args, operands)
        if step.codes is None:
            return result
        codes = rescale(result, tensors["multiplier"], tensors["shift"]) + step.codes.zero_point
        return codes.clamp(step.codes.low, step.codes.high).to(self.accumulator)

    def _reals(self, values: dict[str, Tensor]) -> Tensor:
        result, steps = values[self.program.output], self.program.steps
        last = next((step for step in steps if step.output == self.program.output), None)
        codes = self.program.input if last is None else last.codes
        if codes is not None:
            return (result - codes.zero_point).float() * codes.scale
        unit = self.program.tensors[last.tensors["unit"]] if last is not None else 1
        return (result.double() * unit).float()


def _convolution(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[inputs[0].dim()]
    sums: Tensor = function(inputs[0], tensors["weight"], tensors.get("bias"), **args)
    return sums


def _linear(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    sums = torch.matmul(inputs[0], tensors["weight"].T)
    return sums + tensors["bias"] if "bias" in tensors else sums


def _add(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    factors = tensors["factors"]
    return inputs[0] * factors[0] + inputs[1] * factors[1]


def _sum(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return inputs[0].sum(args["dims"], keepdim=args["keepdim"], dtype=inputs[0].dtype)


def _sum_windows(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    x = F.pad(inputs[0], args["pad"])
    for dim, (size, stride) in enumerate(zip(args["kernel"], args["stride"], strict=True), start=2):
        x = x.unfold(dim, size, stride)
    return x.sum([*range(-len(args["kernel"]), 0)], dtype=x.dtype)


def _same(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return inputs[0]


def _max_pool(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    function = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[inputs[0].dim()]
    result: Tensor = function(inputs[0], **args)
    return result


def _pad(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return F.pad(inputs[0], args["pad"], value=args["value"])


def _reshape(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return inputs[0].reshape(len(inputs[0]), *args["shape"])


def _permute(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return inputs[0].permute(args["dims"])


def _concatenate(inputs: list[Tensor], args: dict[str, Any], tensors: _Tensors) -> Tensor:
    return torch.cat(inputs, args["dim"])


_OPERANDS = ("weight", "bias", "factors")
_OPERATIONS: dict[str, _Operation] = {
    "convolution": _convolution,
    "linear": _linear,
    "add": _add,
    "sum": _sum,
    "sum_windows": _sum_windows,
    "rescale": _same,
    "max_pool": _max_pool,
    "pad": _pad,
    "reshape": _reshape,
    "permute": _permute,
    "concatenate": _concatenate,
}

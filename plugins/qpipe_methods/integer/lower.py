"""From an exported graph with quantize and dequantize operations to an integer program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qpipe import RecipeError
from qpipe_methods.integer.dyadic import dyadic, shared_dyadic
from qpipe_methods.integer.program import Codes, Program, Step

_INT32 = 2**31 - 1
_BIAS_CODES = 2**30  # half of int32, the other half is left to the products
_ADD_BITS = 21  # of a factor: two 9-bit codes times it fit int32
_ADVICE = "leave out exporter integer"


@dataclass(frozen=True)
class _Coded:
    """A value of the program that is codes."""

    name: str
    codes: Codes

    @property
    def largest(self) -> int:
        """Largest magnitude of code - zero_point."""
        return max(self.codes.high - self.codes.zero_point, self.codes.zero_point - self.codes.low)


@dataclass(frozen=True)
class _Sum:
    """A result that waits for its quantizer.

    Args:
        units: real value of one unit of the sum, broadcastable to it; of 'add', one for each operand.
        bound: largest magnitude of the sum for any input.
        low, high: reals it is clipped to.
    """

    step: Step
    units: Tensor
    bound: float
    low: float = -math.inf
    high: float = math.inf

    def clipped(self, low: float, high: float) -> _Sum:
        """Return the sum with a clip behind it."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))


@dataclass(frozen=True)
class _Weight:
    """Codes less their zero points, and a scale for each output channel or one for all."""

    centred: Tensor
    scale: Tensor


_Value = _Coded | _Sum | _Weight | Tensor | int | str | None


def lower(exported: ExportedProgram, edges: Sequence[str], keyword: str | None) -> tuple[Program, list[str]]:
    """Translate a graph of one input and one output.

    Args:
        edges: what the simulation calls its activation quantizers, in order of execution.
        keyword: of the input in a call; None: it is positional.

    Returns:
        the program, and the value of each quantizer in order of execution.

    Raises:
        RecipeError: something in the graph has no integer form.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        functional = exported.run_decompositions({})  # nothing is changed in place
    lowering = _Lowering(functional, edges)
    return lowering.program(keyword), lowering.quantized


class _Lowering:
    def __init__(self, exported: ExportedProgram, edges: Sequence[str]) -> None:
        self.exported = exported
        self.edges = edges
        self.quantized: list[str] = []
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.input: Codes | None = None

    def program(self, keyword: str | None) -> Program:
        self._enter_placeholders()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
        outputs = next(n for n in self.exported.graph.nodes if n.op == "output").args[0]
        if len(outputs) != 1 or self.input is None:
            raise RecipeError(
                f"an integer program has one quantized input and one output, the model {len(outputs)} "
                f"outputs; {_ADVICE}"
            )
        output = self._returned(outputs[0])
        return Program(self.input, keyword, output, tuple(self.steps), self.tensors)

    def _enter_placeholders(self) -> None:
        signature = self.exported.graph_signature
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        stored = {**self.exported.constants, **self.exported.state_dict}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                target = targets.get(node.name)
                self.values[node] = "input" if target is None else stored[target].detach()

    def _call(self, node: fx.Node) -> _Value:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            raise RecipeError(
                f"{node.target} computes sizes as it runs, which has no integer form; {_ADVICE}"
            )
        operation = schema.name.split("::")[-1]
        rule = _RULES.get(operation)
        if rule is None:
            raise RecipeError(f"operation '{operation}' has no integer form here; {_ADVICE}")
        arguments = {a.name: a.default_value for a in schema.arguments}
        arguments |= dict(zip(arguments, node.args, strict=False)) | node.kwargs
        return rule(self, node, {name: self._value(x) for name, x in arguments.items()})

    def _value(self, argument: Any) -> Any:  # noqa: ANN401  # nodes become their values
        return pytree.tree_map_only(fx.Node, self.values.__getitem__, argument)

    def _coded(self, value: _Value, what: str) -> _Coded:
        """Return value as codes."""
        if not isinstance(value, _Coded):
            raise RecipeError(
                f"'{what}' reads a tensor without a quantizer, which has no integer form; use target=x86 "
                f"and no layers rule that leaves an activation in floating point, or {_ADVICE}"
            )
        return value

    def _store(self, output: str, **tensors: Tensor | None) -> dict[str, str]:
        found = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        self.tensors |= {f"{output}.{role}": tensor for role, tensor in found.items()}
        return {role: f"{output}.{role}" for role in found}

    # quantizers ------------------------------------------------------------------------------------------

    def _quantize(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        codes = Codes(float(a["scale"]), int(a["zero_point"]), int(a["quant_min"]), int(a["quant_max"]))
        edge, value = self.edges[len(self.quantized)], a["input"]
        if value == "input":
            if self.input not in (None, codes):
                raise RecipeError(f"the input is quantized in two ways; {_ADVICE}")
            self.input = codes
            self.quantized.append("input")
            return _Coded("input", codes)
        if isinstance(value, _Coded):
            value = self._sum("rescale", node, value, {}, 1)
        if not isinstance(value, _Sum):
            raise RecipeError(f"edge '{edge}' quantizes a constant or a second input; {_ADVICE}")
        self.quantized.append(node.name)
        return self._finish(value, codes, node.name, edge)

    def _finish(self, value: _Sum, codes: Codes, output: str, edge: str | None = None) -> _Coded:
        """End a sum with multiplication, shift, zero point and clip."""
        if value.bound > _INT32:
            raise RecipeError(
                f"the sum before edge '{edge}' may reach {value.bound:.3g} and int32 holds {_INT32}; use "
                "weight.num_bits=4"
            )
        tensors, ratios = value.step.tensors, value.units / codes.scale
        if value.step.op == "add":
            factors, c = shared_dyadic(ratios, _ADD_BITS)
            tensors = tensors | self._store(output, factors=factors)
            multiplier, shift = torch.ones((), dtype=torch.int32), torch.tensor(c, dtype=torch.int32)
        else:
            multiplier, shift = dyadic(ratios)
        tensors = tensors | self._store(output, multiplier=multiplier, shift=shift)
        clipped = replace(
            codes,
            low=max(codes.low, _code(value.low, codes)),
            high=min(codes.high, _code(value.high, codes)),
        )
        self.steps.append(replace(value.step, output=output, tensors=tensors, codes=clipped, edge=edge))
        return _Coded(output, codes)

    def _returned(self, node: fx.Node) -> str:
        """Return the output's name; a sum without a quantizer stays one."""
        value = self.values[node]
        if isinstance(value, _Coded):
            return value.name
        if not isinstance(value, _Sum) or (value.low, value.high) != (-math.inf, math.inf):
            raise RecipeError(f"the model returns '{node.name}', which has no integer form; {_ADVICE}")
        tensors, units = value.step.tensors, value.units
        if value.step.op == "add":
            factors, c = shared_dyadic(units / units.max(), _ADD_BITS)
            tensors = tensors | self._store(node.name, factors=factors)
            units = units.max() / 2.0**c
        tensors = tensors | self._store(node.name, unit=units)
        self.steps.append(replace(value.step, output=node.name, tensors=tensors))
        return node.name

    def _dequantize(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        if isinstance(a["input"], _Coded):
            return a["input"]
        codes = a["input"].int()
        scale = torch.as_tensor(a.get("scale", a.get("scales")), dtype=torch.float64)
        zero_point = torch.as_tensor(a.get("zero_point", a.get("zero_points")))
        centred = codes - zero_point.int().reshape(-1, *[1] * (codes.dim() - 1))
        return _Weight(centred.to(torch.int8 if int(centred.abs().max()) < 128 else torch.int16), scale)

    # what multiplies by weights --------------------------------------------------------------------------

    def _convolution(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        args = {name: _plain(a[name]) for name in ("stride", "padding", "dilation", "groups")}
        return self._products("convolution", node, a, args)

    def _linear(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        return self._products("linear", node, a, {})

    def _products(self, op: str, node: fx.Node, a: dict[str, Any], args: dict[str, Any]) -> _Sum:
        x, weight, bias = self._coded(a["input"], node.name), a["weight"], a["bias"]
        if not isinstance(weight, _Weight):
            raise RecipeError(
                f"the weight of '{node.name}' is not quantized, which has no integer form; quantize every "
                f"weight, or {_ADVICE}"
            )
        centred, units = weight.centred, x.codes.scale * weight.scale.reshape(-1)
        if bias is not None:
            centred, units, bias = _with_bias(centred, units, bias.double())
        tensors = self._store(node.name, weight=centred, bias=bias)
        step = Step(op, (x.name,), node.name, (x.codes.zero_point,), args, tensors)
        sums = centred.flatten(1).long().abs().sum(1) * x.largest + (0 if bias is None else bias.long().abs())
        spatial = centred.dim() - 2 if op == "convolution" else 0
        return _Sum(
            step, units.reshape(-1, *[1] * spatial) if units.numel() > 1 else units[0], float(sums.max())
        )

    # sums of codes ---------------------------------------------------------------------------------------

    def _add(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        if a["alpha"] != 1:
            raise RecipeError(f"'{node.name}' adds a multiple, which has no integer form here; {_ADVICE}")
        x, y = self._coded(a["self"], node.name), self._coded(a["other"], node.name)
        zero_points = (x.codes.zero_point, y.codes.zero_point)
        units = torch.tensor([x.codes.scale, y.codes.scale], dtype=torch.float64)
        bound = float((x.largest + y.largest) * 2**_ADD_BITS)
        return _Sum(Step("add", (x.name, y.name), node.name, zero_points), units, bound)

    def _sum(self, op: str, node: fx.Node, x: _Coded, args: dict[str, Any], count: int) -> _Sum:
        """Return a sum of count codes whose mean is meant."""
        unit = torch.tensor(x.codes.scale / count, dtype=torch.float64)
        step = Step(op, (x.name,), node.name, (x.codes.zero_point,), args)
        return _Sum(step, unit, float(count * x.largest))

    def _mean(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        x, shape = self._coded(a["self"], node.name), _shape(node)
        dims = [dim % len(shape) for dim in a["dim"]]
        return self._sum(
            "sum", node, x, {"dims": dims, "keepdim": bool(a["keepdim"])}, _count(node, shape, dims)
        )

    def _adaptive_pool(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        x, shape = self._coded(a["self"], node.name), _shape(node)
        sizes = a["output_size"]
        spatial = [*range(len(shape) - len(sizes), len(shape))]
        if all(size == 1 for size in sizes):
            return self._sum("sum", node, x, {"dims": spatial, "keepdim": True}, _count(node, shape, spatial))
        if any(
            not isinstance(shape[d], int) or shape[d] % size for d, size in zip(spatial, sizes, strict=True)
        ):
            raise RecipeError(f"the windows of '{node.name}' differ in size; {_ADVICE}")
        kernel = [int(shape[d]) // size for d, size in zip(spatial, sizes, strict=True)]
        args = {"kernel": kernel, "stride": kernel, "pad": [0] * 2 * len(kernel)}
        return self._sum("sum_windows", node, x, args, math.prod(kernel))

    def _average_pool(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        x, kernel = self._coded(a["self"], node.name), [*a["kernel_size"]]
        padding = _spread(a["padding"], len(kernel))
        uneven = a["ceil_mode"] or a.get("divisor_override") or (any(padding) and not a["count_include_pad"])
        if uneven:
            raise RecipeError(f"the windows of '{node.name}' differ in what divides them; {_ADVICE}")
        pad = [size for size in reversed(padding) for _ in range(2)]
        args = {"kernel": kernel, "stride": [*a["stride"]] or kernel, "pad": pad}
        return self._sum("sum_windows", node, x, args, math.prod(kernel))

    def _clip(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        low = a.get("min_val", a.get("min"))
        high = a.get("max_val", a.get("max"))
        return self._clipped(node, a["self"], low, high)

    def _relu(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        return self._clipped(node, a["self"], 0.0, None)

    def _relu6(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        return self._clipped(node, a["self"], 0.0, 6.0)

    def _clipped(self, node: fx.Node, x: _Value, low: Any, high: Any) -> _Value:  # noqa: ANN401
        if any(isinstance(bound, Tensor) for bound in (low, high)):
            raise RecipeError(
                f"'{node.name}' clips each channel to its own range; leave out transform equalize"
            )
        bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        value = x if isinstance(x, _Sum) else self._sum("rescale", node, self._coded(x, node.name), {}, 1)
        return value.clipped(*bounds)

    # moves of codes --------------------------------------------------------------------------------------

    def _move(self, node: fx.Node, x: _Value, op: str, **args: Any) -> _Value:  # noqa: ANN401
        coded = self._coded(x, node.name)
        self.steps.append(Step(op, (coded.name,), node.name, args=args, codes=coded.codes))
        return replace(coded, name=node.name)

    def _nothing(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        value: _Value = a["self"] if "self" in a else a["input"]
        return value

    def _copy(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        source: _Value = a["src"]  # of an operation in place, whose result is written back
        return source

    def _max_pool(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        args = {name: _plain(a[name]) for name in ("kernel_size", "padding", "dilation", "ceil_mode")}
        return self._move(node, a["self"], "max_pool", **args, stride=_plain(a["stride"] or a["kernel_size"]))

    def _pad(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        if a.get("mode", "constant") != "constant" or a["value"]:
            raise RecipeError(f"'{node.name}' pads with other values than 0; {_ADVICE}")
        x = self._coded(a["self"], node.name)
        return self._move(node, x, "pad", pad=[*a["pad"]], value=x.codes.zero_point)

    def _reshape(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        shape = node.meta["val"].shape
        if not all(isinstance(size, int) for size in shape[1:]) or isinstance(shape[0], int):
            raise RecipeError(f"'{node.name}' makes a shape that varies with the input; {_ADVICE}")
        return self._move(node, a["self"], "reshape", shape=[*shape[1:]])

    def _permute(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        return self._move(node, a["self"], "permute", dims=[*a["dims"]])

    def _concatenate(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        """Bring all operands to the codes of the quantizer behind."""
        users = [user for user in node.users if "quantize_per_tensor" in str(user.target)]
        if len(users) != 1 or len(node.users) != 1:
            raise RecipeError(f"'{node.name}' has no quantizer behind it; use target=x86, or {_ADVICE}")
        scale, zero_point, low, high = users[0].args[1:5]
        codes = Codes(float(scale), int(zero_point), int(low), int(high))  # type: ignore[arg-type]
        parts = [self._coded(x, node.name) for x in a["tensors"]]
        names = tuple(self._in_codes(node, i, x, codes) for i, x in enumerate(parts))
        self.steps.append(Step("concatenate", names, node.name, args={"dim": a["dim"]}, codes=codes))
        return _Coded(node.name, codes)

    def _in_codes(self, node: fx.Node, index: int, x: _Coded, codes: Codes) -> str:
        if x.codes == codes:
            return x.name
        return self._finish(self._sum("rescale", node, x, {}, 1), codes, f"{node.name}.{index}").name

    def _size(self, node: fx.Node, a: dict[str, Any]) -> _Value:
        return 0  # shapes are read where they are used


def _with_bias(centred: Tensor, units: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a bias in units of the products; a channel too weak for its bias gets larger units."""
    needed = bias.abs() / _BIAS_CODES
    if units.numel() == 1:
        needed = needed.max().reshape(1)
    coarser = torch.maximum(units, needed)
    if (coarser > units).any():
        ratio = (units / coarser).reshape(-1, *[1] * (centred.dim() - 1))
        centred = torch.round(centred * ratio).to(centred.dtype)
    return centred, coarser, torch.round(bias / coarser).int()


def _code(real: float, codes: Codes) -> int:
    """Return the code of a clip's bound; beyond int32 none is needed."""
    return codes.zero_point + round(max(min(real / codes.scale, _INT32), -_INT32))


def _plain(value: Any) -> Any:  # noqa: ANN401  # a number, or a list of them
    return [*value] if isinstance(value, (list, tuple)) else value


def _shape(node: fx.Node) -> list[Any]:
    return [*node.all_input_nodes[0].meta["val"].shape]


def _count(node: fx.Node, shape: list[Any], dims: Sequence[int]) -> int:
    sizes = [shape[dim] for dim in dims]
    if not all(isinstance(size, int) for size in sizes):
        raise RecipeError(f"'{node.name}' averages a number of values that varies; {_ADVICE}")
    return math.prod(sizes)


def _spread(value: Any, count: int) -> list[int]:  # noqa: ANN401  # one number, or one a dimension
    values = _plain(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


_Rule = Callable[[_Lowering, fx.Node, dict[str, Any]], _Value]
_RULES: dict[str, _Rule] = {
    "quantize_per_tensor": _Lowering._quantize,
    "dequantize_per_tensor": _Lowering._dequantize,
    "dequantize_per_channel": _Lowering._dequantize,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _Lowering._convolution),
    "linear": _Lowering._linear,
    "add": _Lowering._add,
    "mean": _Lowering._mean,
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _Lowering._adaptive_pool
    ),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _Lowering._average_pool),
    "relu": _Lowering._relu,
    "relu6": _Lowering._relu6,
    "hardtanh": _Lowering._clip,
    "clamp": _Lowering._clip,
    "clamp_min": _Lowering._clip,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _Lowering._max_pool),
    **dict.fromkeys(("pad", "constant_pad_nd"), _Lowering._pad),
    **dict.fromkeys(
        ("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"), _Lowering._reshape
    ),
    "permute": _Lowering._permute,
    "cat": _Lowering._concatenate,
    **dict.fromkeys(
        ("dropout", "contiguous", "clone", "detach", "alias", "feature_dropout"), _Lowering._nothing
    ),
    "copy": _Lowering._copy,
    "sym_size": _Lowering._size,
}

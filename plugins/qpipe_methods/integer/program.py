"""A network as a list of integer steps, in one file: tensors, and the list in the header as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpipe import DataError

_PROGRAM = "qpipe.integer"
_VERSION = 1


@dataclass(frozen=True)
class Codes:
    """What codes mean, and where they end: real = scale * (code - zero_point), low <= code <= high."""

    scale: float
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True)
class Step:
    """One operation.

    Args:
        op: a name of the interpreter.
        inputs: values it reads.
        output: value it makes.
        zero_points: of the inputs, subtracted first, where they are added and multiplied; empty where codes
            are only moved.
        args: of the operation: numbers, lists of numbers.
        tensors: keys in the file, by what they are to the operation.
        codes: of the result; None: it stays an int32 sum, in units of the tensor 'unit'.
        edge: what the simulation calls the result, where it has a quantizer.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    zero_points: tuple[int, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    codes: Codes | None = None
    edge: str | None = None


@dataclass(frozen=True)
class Program:
    """Integer steps between one tensor of reals and another.

    Args:
        input: codes of the input.
        keyword: of the input in a call; None: it is the positional argument.
        output: the value that is returned, as reals.
    """

    input: Codes
    keyword: str | None
    output: str
    steps: tuple[Step, ...]
    tensors: dict[str, Tensor] = field(repr=False, compare=False, default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file; its bytes depend on the program alone."""
        about = {
            "version": _VERSION,
            "input": asdict(self.input),
            "keyword": self.keyword,
            "output": self.output,
            "steps": [asdict(step) for step in self.steps],
        }
        tensors = {name: tensor.contiguous() for name, tensor in sorted(self.tensors.items())}
        save_file(tensors, path, metadata={_PROGRAM: json.dumps(about)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that write wrote.

        Raises:
            DataError: it is damaged, another kind of file, or its steps do not follow from one another.
        """
        try:
            with safe_open(path, framework="pt") as file:
                described = (file.metadata() or {}).get(_PROGRAM)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); export the model again") from None
        if described is None:
            raise DataError(f"{path} holds no integer program; give the file that exporter=integer wrote")
        try:
            return cls._checked(json.loads(described), tensors)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} holds a broken program ({error}); export the model again") from None

    @classmethod
    def _checked(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if about["version"] != _VERSION:
            raise ValueError(f"version {about['version']}, this qpipe reads {_VERSION}")
        known = {"input"}
        steps = []
        for entry in about["steps"]:
            made = {
                "inputs": tuple(entry["inputs"]),
                "zero_points": tuple(entry["zero_points"]),
                "codes": _codes(entry["codes"]) if entry["codes"] is not None else None,
            }
            step = Step(**{**entry, **made})
            if not isinstance(step.args, dict) or not isinstance(step.op, str):
                raise ValueError(f"step '{step.output}' is no operation with arguments by name")
            if lost := sorted({*step.inputs} - known | {*step.tensors.values()} - tensors.keys()):
                raise ValueError(f"step '{step.output}' reads '{lost[0]}', which nothing makes")
            known.add(step.output)
            steps.append(step)
        if about["output"] not in known:
            raise ValueError(f"nothing makes the output '{about['output']}'")
        if floating := [n for n, t in tensors.items() if t.is_floating_point() and not n.endswith(".unit")]:
            raise ValueError(f"tensor '{floating[0]}' is not of integers")
        if wide := [n for n, t in tensors.items() if n.endswith(".shift") and ((t < 0) | (t > 62)).any()]:
            raise ValueError(f"tensor '{wide[0]}' shifts by more than 62 bits")
        if not isinstance(about["keyword"], str | None):
            raise ValueError(f"the keyword is {about['keyword']}")
        return cls(_codes(about["input"]), about["keyword"], about["output"], tuple(steps), tensors)


def _codes(entry: dict[str, Any]) -> Codes:
    codes = Codes(**entry)
    integers = (codes.zero_point, codes.low, codes.high)
    if not all(isinstance(value, int) for value in integers) or codes.low > codes.high:
        raise ValueError(f"codes from {codes.low} to {codes.high} around {codes.zero_point}")
    if not (isinstance(codes.scale, float) and 0 < codes.scale < math.inf):
        raise ValueError(f"codes of scale {codes.scale}")
    return codes

"""An archive of torch.export from somewhere else: what would run on loading is refused in one sentence.

torch.export.load unpickles, opens shared libraries, evaluates shapes and guards, imports the modules of
enumerations, and writes names into the source of a function. So nothing passes but what this exporter writes:
tensors as plain bytes, names, arithmetic of sizes, and operations of torch that touch no file.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qpipe import DataError
from qpipe.errors import cause

_PROGRAM = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_INPUTS = "data/sample_inputs/model.pt"  # pickled: empty in what we write
_RECORD = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/\w+"
)
_NAME = re.compile(r"[\w.]*")
_OPERATION = re.compile(r"torch\.ops\.(aten|quantized_decomposed)\.(\w+)\.(\w+)")
_ARITHMETIC = re.compile(
    r"torch\.sym_\w+|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"
)
_FUNCTION = re.compile(
    "Add|And|CeilToInt|CleanDiv|Eq|Equality|Float|FloorDiv|FloorToInt|GreaterThan|Integer|IntTrueDiv|LessThan|"
    "Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|PythonMod|Rational|StrictGreaterThan|StrictLessThan|Unequality"
)
_POWERS = tuple(f"Integer({power})" for power in range(-1, 5))  # larger ones might never end
_SIZE = re.compile(r"(?<![\w.])L(\['\w+'\]|\[\d+\])+\.size\(\)\[\d+\]")  # of an argument, in a guard
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def read(path: Path) -> io.BytesIO:
    """Return the bytes of an archive in which nothing but tensors and torch's own operations is found.

    Raises:
        DataError: it is damaged, or holds something that this exporter never writes.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    content = path.read_bytes()
    try:
        with PT2ArchiveReader(io.BytesIO(content)) as archive:
            _check_records(archive.get_file_names())
            if archive.read_bytes(_INPUTS):
                raise _ForeignError("example inputs, which are pickled")
            for name in _CONFIGS:
                _check_payloads(json.loads(archive.read_bytes(name)))
            _walk(json.loads(archive.read_bytes(_PROGRAM)))
    except _ForeignError as found:
        raise DataError(f"{path} holds {found}, which this exporter never writes; do not trust it") from None
    except Exception as error:  # whatever a damaged archive leads torch to
        raise DataError(f"{path} is no program torch can load ({cause(error)}); export again") from None
    return io.BytesIO(content)


class _ForeignError(Exception):
    """What an archive of ours does not hold."""


def _check_records(names: list[str]) -> None:
    known = {_PROGRAM, *_CONFIGS, _INPUTS}
    for name in names:
        if name not in known and not _RECORD.fullmatch(name):
            raise _ForeignError(f"'{name}'")
    if len({*names}) < len(names):
        raise _ForeignError("two records of one name")


def _check_payloads(config: dict[str, Any]) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] is not False or not re.fullmatch(r"\w+", payload["path_name"]):
            raise _ForeignError(f"'{name}' as a pickle")


def _walk(tree: Any, key: str = "") -> None:  # noqa: ANN401  # JSON
    """Check every string by the key it stands under; where no key is known it has to be a name."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _check_name(name)
            _walk(value, name)
    elif isinstance(tree, list):
        for value in tree:
            _walk(value, key)
    elif isinstance(tree, str):
        _CHECKS.get(key, _check_name)(tree)


def _check_name(text: str) -> None:
    """A name, with dots: torch writes it into the source of a function."""
    if not _NAME.fullmatch(text) or text == "__enum__":
        raise _ForeignError(f"the name {text[:40]!r}")


def _check_operation(text: str) -> None:
    if _ARITHMETIC.fullmatch(text):
        return
    operation: Any = torch.ops if (found := _OPERATION.fullmatch(text)) else None
    for name in found.groups() if found else ():
        operation = getattr(operation, name, None)
    schema = getattr(operation, "_schema", None)
    if schema is None or any(argument.name == "filename" for argument in schema.arguments):
        raise _ForeignError(f"the operation {text[:60]!r}")


def _check_expression(text: str) -> None:
    if not _arithmetic(ast.parse(text.strip(), mode="eval").body):
        raise _ForeignError(f"the expression {text[:60]!r}")


def _check_guard(text: str) -> None:
    _check_expression(_SIZE.sub("0", text))


def _arithmetic(node: ast.AST) -> bool:
    """Say whether an expression is arithmetic of sizes: sympy and torch evaluate it as Python."""
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.Call(func=ast.Name("Symbol"), args=[ast.Constant(value=str(name))], keywords=facts):
            return name.isidentifier() and all(isinstance(fact.value, ast.Constant) for fact in facts)
        case ast.Call(func=ast.Name("Pow"), args=[base, power], keywords=[]):
            return _arithmetic(base) and ast.unparse(power) in _POWERS
        case ast.Call(func=ast.Name(name), args=args, keywords=[]):
            return _FUNCTION.fullmatch(name) is not None and all(map(_arithmetic, args))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return _arithmetic(operand)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Mod()):
            return _arithmetic(node.left) and _arithmetic(node.right)
        case ast.Compare(left=left, comparators=right):
            return all(map(_arithmetic, [left, *right]))
        case ast.BoolOp(values=values):
            return all(map(_arithmetic, values))
    return False


def _check_structure(text: str) -> None:
    """How a call's arguments, or what it returns, are nested: JSON in JSON."""
    _check_nested(json.loads(text)[1])


def _check_nested(spec: dict[str, Any]) -> None:
    if spec["type"] not in _CONTAINERS:
        raise _ForeignError(f"a {spec['type']}")
    if spec["context"] is not None:
        _walk(json.loads(spec["context"]))
    for child in spec["children_spec"]:
        _check_nested(child)


def _check_nothing(text: str) -> None:
    """An argument of an operation, or a version: never evaluated."""


_CHECKS: dict[str, Callable[[str], None]] = {
    "target": _check_operation,
    "as_operator": _check_operation,
    "expr_str": _check_expression,
    "guards_code": _check_guard,
    "in_spec": _check_structure,
    "out_spec": _check_structure,
    "as_string": _check_nothing,
    "torch_version": _check_nothing,
}

"""The core knows kinds, never methods."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qpipe
from qpipe.registry import PluginRegistry

CORE = Path(qpipe.__file__).parent
ALSO_OTHER_WORDS = {
    "float",
    "none",
    "distill",
}  # Python's type; nothing chosen; a key of every training strategy
METHODS = ("calibrator", "quantizer", "transform", "finetune")


@pytest.fixture(scope="module")
def names() -> set[str]:
    registry = PluginRegistry.load_installed()
    return {name for kind in METHODS for name in registry.names(kind)} - ALSO_OTHER_WORDS


def _docstrings(tree: ast.AST) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


def _decided_on(tree: ast.AST) -> Iterator[ast.Constant]:
    """Find strings that are compared, looked up or dispatched on."""
    for node in ast.walk(tree):
        children: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            children = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            children = [node.slice]
        elif isinstance(node, ast.MatchValue):
            children = [node.value]
        elif isinstance(node, ast.Call):
            children = [*node.args, *(keyword.value for keyword in node.keywords)]
        for child in children:
            yield from (leaf for leaf in ast.walk(child) if isinstance(leaf, ast.Constant))


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_decides_nothing_by_a_methods_name(path: Path, names: set[str]) -> None:
    tree = ast.parse(path.read_text())
    written = _docstrings(tree)
    found = [
        f"{path.name}:{node.lineno}: {node.value!r}"
        for node in _decided_on(tree)
        if id(node) not in written and isinstance(node.value, str) and node.value in names
    ]
    assert not found

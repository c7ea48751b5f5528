"""Write docs/methods.md: each method with its paper, its equation and the facts its tests hold it to.

Read from docstrings and tests by ast alone, so that the page says what the code says; `--check` compares.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
KINDS = (
    *("transform", "granularity", "calibrator", "quantizer"),
    *("finetune", "evaluator", "exporter", "tracker", "sweeper"),
)
HEAD = """# Methods

Written by `python scripts/catalogue.py` from docstrings and tests; a test compares. Each heading is a word of
the command line; each fact names the test that fails when it no longer holds.
"""


def page() -> str:
    parts = [HEAD]
    for kind in KINDS:
        methods = sorted(ROOT.glob(f"plugins/qpipe_*/{kind}/[a-z]*.yaml"), key=lambda path: path.stem)
        parts += [f"\n## {kind}\n", *(entry(kind, path.with_suffix(".py")) for path in methods)]
    return "".join(parts)


def entry(kind: str, path: Path) -> str:
    tree = ast.parse(path.read_text())
    text = ast.get_docstring(class_of(tree, path)) or ""
    lines = [f"\n### `{kind}={path.stem}`\n\n{summary(tree)}\n"]
    lines += [f"\n{word}: {found}\n" for word in ("Source", "Equation") if (found := section(text, word))]
    own = sorted(ROOT.glob(f"tests/**/{kind}/test_{path.stem}.py"))
    found = [fact for test in own for fact in facts(test)]
    if not own:  # tested together with others
        imported = f".{kind}.{path.stem} import "
        shared = [test for test in sorted(ROOT.glob("tests/**/test_*.py")) if imported in test.read_text()]
        found = [fact for test in shared for fact in facts(test, class_of(tree, path))]
    return "".join([*lines, "\n" if found else "", *found])


def class_of(tree: ast.Module, path: Path) -> ast.ClassDef:
    """Return the class whose `name` is the method's."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and f"name = '{path.stem}'" in map(ast.unparse, node.body):
            return node
    raise SystemExit(f"no class in {path} has name = '{path.stem}'")


def summary(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")


def section(text: str, word: str) -> str:
    """Return what follows `word:` up to the next such word or a blank line, on one line."""
    found = re.search(rf"^{word}: (.*?)(?=\n\n|\n[A-Z]\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def facts(path: Path, of: ast.ClassDef | None = None) -> Iterator[str]:
    """Yield the facts of a file's tests; `of` a class, those that use it."""
    for node, names in tests(path):
        if not of or of.name in names:
            fact = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            words = node.name.removeprefix("test_").replace("_", " ")
            yield f"- {fact or words + '.'} `{path.relative_to(ROOT).as_posix()}::{node.name}`\n"


@functools.cache
def tests(path: Path) -> list[tuple[ast.FunctionDef, set[str]]]:
    """Return the tests of a file, each with the names it uses."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    names = [{name.id for name in ast.walk(node) if isinstance(name, ast.Name)} for node in found]
    return [pair for pair in zip(found, names, strict=True) if pair[0].name.startswith("test_")]


def main() -> int:
    if "--check" in sys.argv:
        return int(PAGE.read_text() != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page of methods is what the code and its tests say."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def catalogue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "scripts" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    """Run `python scripts/catalogue.py` after a method or a test of one has changed."""
    module = catalogue()
    assert module.PAGE.read_text() == module.page()


METHODS = [
    path
    for kind in ("transform", "granularity", "calibrator", "quantizer", "finetune")
    for path in sorted(ROOT.glob(f"plugins/qpipe_methods/{kind}/[a-z]*.yaml"))
]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_method_has_a_source_an_equation_and_tested_facts(path: Path) -> None:
    """A method is registered only with a paper and a test."""
    entry = catalogue().entry(path.parent.name, path.with_suffix(".py"))
    assert "::test_" in entry
    if path.stem not in ("layer", "none", "revert"):  # not a method of any paper
        assert "\nSource: " in entry
        assert "\nEquation: " in entry or path.parent.name == "granularity"

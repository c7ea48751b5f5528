"""The page of methods is what the code and its tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


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


def test_every_quantizer_has_a_source_and_tested_facts() -> None:
    """A method is registered only with a paper and a test."""
    module = catalogue()
    for path in sorted(ROOT.glob("plugins/qpipe_methods/quantizer/[a-z]*.yaml")):
        entry = module.entry("quantizer", path.with_suffix(".py"))
        assert "\nSource: " in entry, path.stem
        assert "::test_" in entry, path.stem

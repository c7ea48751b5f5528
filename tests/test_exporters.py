"""The table of quantizers and exporters is what running every pair gives."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qpipe.registry import PluginRegistry

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"compressed_tensors": "compressed_tensors", "openvino": "openvino"}
EXPORTERS = ("compressed_tensors", "integer", "onnx", "openvino", "safetensors", "torch")


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exporters", ROOT / "scripts" / "exporters.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTERS)
def test_the_column_is_up_to_date(name: str) -> None:
    """Run `python scripts/exporters.py` after a quantizer or an exporter has changed."""
    pytest.importorskip(NEEDS.get(name, "qpipe"), reason=f"the extra of exporter '{name}' is not installed")
    module = script()
    with module.hurried():
        assert module.PAGE.read_text() == module.page([name])


def test_no_exporter_is_left_out() -> None:
    assert set(PluginRegistry.load_installed().names("exporter")) <= set(EXPORTERS)

"""Write a plugin package that passes its own tests as created."""

from __future__ import annotations

import re
from pathlib import Path

from qpipe.errors import RecipeError

_FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "A calibrator for qpipe."
requires-python = ">=3.11"
dependencies = ["qpipe-quant"]

[project.entry-points.qpipe]
{word} = "{package}"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = ["--import-mode=importlib"]
""",
    "{package}/__init__.py": "qpipe_api = 1\n",
    "{package}/calibrator/__init__.py": "",
    "{package}/calibrator/{word}.py": '''\
"""Keep a fixed share of the range seen."""

from __future__ import annotations

from typing import Any

from qpipe import Calibrator, Quantizer, QuantSpec, Range, Statistics, hookimpl


class {title}Calibrator(Calibrator[Statistics]):
    """Scale both ends of the range by one ratio.

    Args:
        ratio: of the range that is kept, in (0, 1].
    """

    name = "{word}"

    def __init__(self, ratio: float = 0.9) -> None:
        self.ratio = ratio

    def range(self, stats: Statistics, quantizer: Quantizer[Any], spec: QuantSpec) -> Range:
        """Return the extremes times the ratio."""
        seen = stats.extremes()
        return Range(seen.low * self.ratio, seen.high * self.ratio)


@hookimpl
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:
    """Offer the {word} calibrator."""
    return [{title}Calibrator]
''',
    "{package}/calibrator/{word}.yaml": """\
# A fixed share of the range seen.
name: {word}
ratio: 0.9  # of the range, in (0, 1]
""",
    "tests/test_{word}.py": """\
import torch
from {package}.calibrator.{word} import {title}Calibrator

from qpipe.testing import CalibratorContract


class Test{title}(CalibratorContract):
    calibrator = {title}Calibrator(ratio=0.5)

    def test_keeps_half_of_the_range(self) -> None:
        got = self.ranged(torch.tensor([[-2.0, 0.0, 1.0, 6.0]]))
        assert (got.low.item(), got.high.item()) == (-1.0, 3.0)
""",
    "README.md": """\
# {distribution}

A calibrator for qpipe: `python -m qpipe calibrator={word}`.

    pip install -e . && pytest
""",
}


def write_plugin(name: str, parent: Path) -> Path:
    """Write the package into parent/name and return that folder.

    Args:
        name: of the distribution: 'qpipe-mine' makes the package qpipe_mine and the calibrator 'mine'.

    Raises:
        RecipeError: the name makes no package, or the folder exists.
    """
    package = name.lower().replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package):
        raise RecipeError(f"'{name}' makes no package name; use letters, digits and '-': qpipe-mine")
    word = package.removeprefix("qpipe_")
    folder = parent / name
    if folder.exists():
        raise RecipeError(f"{folder} exists already; choose another name or --folder")
    names = {
        "distribution": name,
        "package": package,
        "word": word,
        "title": "".join(part.title() for part in word.split("_")),
    }
    for path, text in _FILES.items():
        file = folder / path.format(**names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(**names))
    return folder

"""The groups a run is composed of and their options, read from files alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qpipe.registry import conf_dir, installed_packages

SEVERAL = ("transform", "finetune", "evaluator", "exporter")  # several may be chosen, in order
_ORDER = (
    *("model", "data", "task", "target", "weight", "activation", "quantizer", "calibrator", "granularity"),
    *("layers", "transform", "bits", "finetune", "evaluator", "exporter", "tracker", "trainer", "experiment"),
)

_HYDRAS = {"sweeper": "hydra/sweeper"}  # chosen by a word of Hydra's own


@dataclass(frozen=True)
class Option:
    """A yaml file that can be chosen: `group=name`."""

    path: Path

    @cached_property
    def description(self) -> str:
        """Its first comment line."""
        with self.path.open() as lines:
            for line in lines:
                if line.startswith("#") and "@package" not in line:
                    return line.strip("# \n")
        return ""

    @property
    def is_preset(self) -> bool:
        """Whether it chooses of another group as well, which a slot cannot."""
        return "override /" in self.path.read_text()


def groups() -> dict[str, dict[str, Option]]:
    """Return every group's options by name: ours first, then those of each plugin package."""
    found: dict[str, dict[str, Option]] = {}
    for folder in [conf_dir(), *(package.folder for package in installed_packages()[0])]:
        for path in sorted(folder.glob("*/*.yaml")):
            group = _HYDRAS.get(path.parent.name, path.parent.name)
            found.setdefault(group, {}).setdefault(path.stem, Option(path))
    return found


def rank(name: str) -> tuple[int, str]:
    """Return where a group or key stands among the others, for sorting: in the order a run meets them."""
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)

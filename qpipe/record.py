"""What a run leaves behind: a folder that is whole, or none."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from qpipe.errors import RecipeError
from qpipe.types import Report

SAMPLES = "samples.safetensors"
_Config = Mapping[str, Any]


def environment() -> dict[str, Any]:
    """Return what a figure depends on beside the recipe: versions, processor, threads."""
    packages = ("qpipe-quant", "torch", "pytorch-lightning", "onnxruntime")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def report_dict(report: Report) -> dict[str, Any]:
    """Return a report as plain data, for JSON."""
    artifacts = [
        {**{k: v for k, v in vars(a).items() if k != "module"}, "path": str(a.path), "proof": dict(a.proof)}
        for a in report.artifacts
    ]
    rest = {k: v for k, v in vars(report).items() if k not in ("artifacts", "folder")}
    return {**rest, "artifacts": artifacts}


@contextmanager
def staged(folder: Path | None) -> Iterator[Path]:
    """Yield a folder to write into; it becomes folder when the block ends well, and vanishes otherwise."""
    parent = folder.parent if folder else Path(tempfile.gettempdir())
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"out={folder} exists already and is not an empty folder; choose another")
    made = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name if folder else 'qpipe'}-", dir=parent))
    except OSError as error:
        raise RecipeError(
            f"out={folder} cannot be written: {error.strerror}; choose another folder"
        ) from None
    staging.chmod(0o755)
    try:
        yield staging
        if folder:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # what now holds the run stays
            for place in made:
                place.rmdir()


def write_record(
    report: Report, config: _Config | None, folder: Path, samples: Mapping[str, Tensor] | None = None
) -> None:
    """Write report.json, config.yaml from which the run can be repeated, and figures sample by sample."""
    if samples:
        save_file({name: values.contiguous() for name, values in samples.items()}, folder / SAMPLES)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    text = json.dumps(strict(report_dict(report)), indent=1, default=str, allow_nan=False)
    (folder / "report.json").write_text(text + "\n")


def write_aside(path: Path, text: str) -> None:
    """Write a file at once: whoever is killed or reads meanwhile has the old one or the new one."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def strict(value: Any) -> Any:  # noqa: ANN401  # a tree of plain values
    """Write 'inf' and 'nan' as text, which JSON has no numbers for (an exact copy has infinite SQNR)."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a toy plugin distribution for one test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    packages = []

    def write(
        name: str, files: Mapping[str, str], entry: str | None = None, api: str = "qpipe_api = 1\n"
    ) -> Path:
        info = site / f"{name}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[qpipe]\n{entry or f'{name} = {name}'}\n")
        for path, text in {"__init__.py": api, **files}.items():
            file = site / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        packages.append(name)
        return site

    yield write
    for module in [m for m in sys.modules if m.partition(".")[0] in packages]:
        del sys.modules[module]

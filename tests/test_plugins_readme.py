from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qpipe import hookspecs
from qpipe.__main__ import main
from qpipe.registry import KINDS, PluginRegistry

README = Path(__file__).parent.parent / "plugins" / "README.md"
FILES = dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", README.read_text(), re.M | re.S))
COMMANDS = re.search(r"^```bash\n(.*?)^```$", README.read_text(), re.M | re.S)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the page's files as an installed distribution."""
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    info = tmp_path / "qpipe_mine-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qpipe-mine\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qpipe]\nmine = qpipe_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_shows_a_whole_package() -> None:
    assert [*FILES] == [
        *("pyproject.toml", "qpipe_mine/__init__.py"),
        *("qpipe_mine/calibrator/quarter.py", "qpipe_mine/calibrator/quarter.yaml", "tests/test_quarter.py"),
    ]
    assert 'mine = "qpipe_mine"' in FILES["pyproject.toml"]


def test_a_calibrator_is_one_file_under_sixty_lines_and_a_yaml() -> None:
    assert len(FILES["qpipe_mine/calibrator/quarter.py"].splitlines()) < 60
    assert yaml.safe_load(FILES["qpipe_mine/calibrator/quarter.yaml"]) == {"name": "quarter", "ratio": 0.75}


def test_it_registers_and_passes_its_own_tests(mine: Path) -> None:
    assert PluginRegistry.load_installed().create("calibrator", "quarter").ratio == 0.75
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=mine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_commands_run(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS is not None
    for line in COMMANDS[1].splitlines():
        python, dash_m, qpipe, *words = shlex.split(line)
        assert (python, dash_m, qpipe) == ("python", "-m", "qpipe")
        assert main(words) == 0
        assert "quarter" in capsys.readouterr().out


def test_every_hook_is_on_the_page() -> None:
    text = README.read_text()
    for kind in KINDS:
        hook = f"qpipe_register_{kind}"
        assert f"| {kind} | `{hook}` |" in text
        assert getattr(hookspecs, hook).__doc__

"""The example plugin, installed for real as a stranger's would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "plugins" / "qpipe-example"
SWEEP = [
    "calibrator=sigma,minmax",
    "quantizer=power_of_two",
    "transform=[]",
    "exporter=[]",
    "evaluator=[sqnr]",
]
WORKER = """
import multiprocessing as mp


def build(name):
    from qpipe.registry import PluginRegistry

    return PluginRegistry.load_installed().create("calibrator", name).num_sigmas


if __name__ == "__main__":
    with mp.get_context("spawn").Pool(1) as pool:
        print(pool.map(build, ["sigma"]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(EXAMPLE)], check=True)
    return folder


def call(site: Path, *words: str, cwd: Path | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd or site,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_shows_its_methods(site: Path) -> None:
    text = call(site, "-m", "qpipe", "--help")
    assert "sigma                The mean and a few standard deviations" in text
    assert "power_of_two         Uniform levels" in text


def test_it_is_listed_with_its_distribution(site: Path) -> None:
    listed = json.loads(call(site, "-m", "qpipe.cli", "plugins", "--json"))
    mine = {row["name"]: row for row in listed["plugins"] if row["distribution"] == "qpipe-example"}
    assert {"sigma", "power_of_two"} == set(mine)
    assert listed["broken"] == []


def test_a_sweep_runs_it(site: Path, tmp_path: Path) -> None:
    call(site, "-m", "qpipe", "-m", *SWEEP, "tracker=null", "out=sweep", cwd=tmp_path)
    reports = [json.loads((tmp_path / "sweep" / job / "report.json").read_text()) for job in "01"]
    assert [report["edges"][0]["calibrator"] for report in reports] == ["sigma", "minmax"]
    assert [report["weights"][0]["quantizer"] for report in reports] == ["power_of_two"] * 2
    assert all(report["metrics"]["simulated"]["sqnr_db"] > 15 for report in reports)


def test_a_worker_process_finds_it(site: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    assert call(site, "worker.py", cwd=tmp_path).strip() == "[4.0]"


def test_its_own_tests_pass(site: Path) -> None:
    call(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), cwd=EXAMPLE)

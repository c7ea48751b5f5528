"""Every wish of conf/experiment/ is granted: run on one batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qpipe.config import compose_config, conf_dir
from qpipe.jobs import run_job
from qpipe.registry import PluginRegistry

ONE_BATCH = (
    *("data.calibration.num_samples=32", "trainer.limit_train_batches=1", "trainer.limit_predict_batches=1"),
    *("trainer.enable_progress_bar=false", "exporter=[]", "evaluator=[accuracy,sqnr,size]", "tracker=null"),
    "cache=false",
)
DECODERS = {"awq_w4"}  # name a decoder's layers: tests/zoo/test_language.py runs them
DEPTHWISE = {"w4_depthwise8_ptq"}  # w4_ptq and a rule for layers that the network of digits lacks
NAMES = sorted({path.stem for path in (conf_dir() / "experiment").glob("*.yaml")} - DECODERS - DEPTHWISE)


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry.load_installed()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_one_batch(name: str, registry: PluginRegistry, tmp_path: Path) -> None:
    config = compose_config([f"experiment={name}", f"out={tmp_path / 'run'}", *ONE_BATCH])
    for strategy in config["finetune"].values():
        strategy |= {"epochs": 1} if "epochs" in strategy else {}
    report = run_job(config, registry)
    assert report.metrics["simulated"]["size_bytes"] < report.metrics["fp32"]["size_bytes"]
    assert math.isfinite(report.metrics["simulated"]["sqnr_db"])
    assert (tmp_path / "run" / "report.html").is_file()

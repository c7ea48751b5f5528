from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from qpipe_methods.calibrator.minmax import MinMaxCalibrator
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import nn

from qpipe import ExportContext, QuantSpec, Recipe, Role, Slot, Target, Task
from qpipe.__main__ import main
from qpipe.nn import edge_quantizers, observing
from qpipe.stages.calibrate import calibrate_weights, fit, needed
from qpipe.stages.prepare import prepare

Install = Callable[..., Path]
THINGS = '''
import os, signal
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 4, **more):
        super().__init__()
        self.fc = nn.Linear(3, width)

    def forward(self, x):
        return self.fc(x)


class Signals(Net):
    """Is told to stop in its third forward pass."""

    calls = 0

    def __init__(self, signal: str = "SIGTERM"):
        super().__init__()
        self.signal = signal

    def forward(self, x):
        Signals.calls += 1
        if Signals.calls % 3 == 0:
            os.kill(os.getpid(), getattr(signal, self.signal))
        return super().forward(x)


class Fails(Net):
    def forward(self, x):
        raise RuntimeError("this net fails")


def batches(count: int = 2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, generator=generator) for _ in range(count)]
'''
TRACKER = '''
import json
from pathlib import Path
from qpipe import Tracker, hookimpl


class Toy(Tracker):
    """Write down what it is told."""

    name = "toy"

    def __init__(self, file):
        self.file = Path(file)

    def _say(self, *words):
        with self.file.open("a") as file:
            file.write(json.dumps(words) + "\\n")

    def start_sweep(self, config, earlier=None):
        self._say("start_sweep", *([earlier] if earlier else []))
        return "parent"

    def finish_sweep(self, parent, status, folder):
        self._say("finish_sweep", parent, status)

    def start(self, config, parent=None):
        self._say("start", parent)
        return False

    def finish(self, report, folder, status):
        written = folder is not None and (folder / "report.json").is_file()
        self._say("finish", report is not None, written, status)
        return "look here"

    def sync(self, folder, parent=None):
        self._say("sync", folder.name, *([parent] if parent else []))
        return f"recorded {folder.name}"


@hookimpl
def qpipe_register_tracker():
    return [Toy]
'''
SMALL = ["data._target_=toyrun.things.batches", "task._target_=qpipe.Task", "transform=[]", "exporter=[]"]


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


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Return a function that builds an 8-bit min-max recipe for a target, other fields as given."""

    def make(target: str = "x86", **changes: Any) -> Recipe:  # noqa: ANN401
        text = (Path(__file__).parents[1] / "conf" / "target" / f"{target}.yaml").read_text()
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in yaml.safe_load(text).items()}
        weight = QuantSpec(restricted=True, role=Role.WEIGHT)
        activation = QuantSpec(symmetric=False, signed=False)
        parts = UniformQuantizer(), MinMaxCalibrator()
        slots = Slot(*parts, PerChannel(), weight), Slot(*parts, PerLayer(), activation)
        return replace(Recipe(*slots, Target(**fields)), **changes)

    return make


@pytest.fixture
def calibrate_on() -> Callable[..., None]:
    """Return a function that calibrates a prepared model on the arguments of one call."""

    def calibrate(model: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        calibrate_weights(model)
        edges = {edge: needed(edge.slot)() for edge in edge_quantizers(model)}
        with torch.no_grad(), observing(edges):
            model.eval()(*args, **kwargs)
        for edge, stats in edges.items():
            edge.set_qparams(fit(stats, edge.slot))

    return calibrate


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test find what an earlier session kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def toyrun(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return the command on a toy model, in an empty folder; what its tracker heard is in told.txt."""
    told = tmp_path / "told.txt"
    files = {
        "things.py": THINGS,
        "tracker/toy.py": TRACKER,
        "tracker/toy.yaml": f"# A toy.\nname: toy\nfile: {told}\n",
    }
    install("toyrun", files)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str, net: str = "Net") -> int:
        model = [f"model._target_=toyrun.things.{net}"]
        return main([*model, *SMALL, "evaluator=[size]", "tracker=toy", *words])

    return run


@pytest.fixture
def make_context(
    make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None], tmp_path: Path
) -> Callable[..., ExportContext]:
    """Return a function that calibrates a model on its first batch and gives what exporters get."""

    def make(model: nn.Module, batches: Any, recipe: Recipe | None = None) -> ExportContext:  # noqa: ANN401
        recipe, task = recipe or make_recipe(), Task()
        simulation = copy.deepcopy(model).eval()
        prepare(simulation, batches, task, recipe)
        args, kwargs = task.inputs(batches[0])
        calibrate_on(simulation, *args, **kwargs)
        return ExportContext(simulation, model.eval(), batches, task, recipe, tmp_path)

    return make

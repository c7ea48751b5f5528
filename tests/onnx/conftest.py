from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import nn

from qpipe import Artifact, ExportContext, Recipe, Task
from qpipe.stages.prepare import prepare

Export = Callable[..., tuple[nn.Module, Artifact]]


@pytest.fixture
def export(make_recipe: Callable[..., Recipe], calibrate_on: Callable[..., None], tmp_path: Path) -> Export:
    def run(model: nn.Module, batches: Any, recipe: Recipe | None = None) -> tuple[nn.Module, Artifact]:  # noqa: ANN401
        recipe, task = recipe or make_recipe(), Task()
        simulation = copy.deepcopy(model).eval()
        prepare(simulation, batches, task, recipe)
        args, kwargs = task.inputs(batches[0])
        calibrate_on(simulation, *args, **kwargs)
        context = ExportContext(simulation, model.eval(), batches, task, recipe, tmp_path)
        return simulation, OnnxExporter().export(context)

    return run

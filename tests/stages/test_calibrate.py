"""One pass over the data; the same facts from one process and from two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.calibrator.moving_average import MovingAverageCalibrator
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.quantizer.uniform import UniformQuantizer
from torch import Tensor, multiprocessing, nn

from qpipe import Histogram, QuantSpec, Role, Slot
from qpipe.choices import build_recipe, library_config
from qpipe.errors import DataError, RecipeError
from qpipe.nn import edge_quantizers, weight_quantizers
from qpipe.pipeline import _quiet_trainer
from qpipe.registry import PluginRegistry
from qpipe.stages.calibrate import calibrate, needed
from qpipe.stages.data import Shard
from qpipe.stages.prepare import prepare
from qpipe.task import Task


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def calibrated(batches: Any, model: nn.Module | None = None, **choices: Any) -> nn.Module:  # noqa: ANN401
    recipe = build_recipe(library_config(choices, exporting=False), PluginRegistry.load_installed())
    torch.manual_seed(0)
    model = model or Net()
    prepare(model, batches, Task(), recipe)
    calibrate(model, batches, Task(), _quiet_trainer())
    return model


def batches_of(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [2 * torch.randn(5, 6, generator=generator) for _ in range(count)]


def test_scales_are_the_extremes_over_the_steps() -> None:
    batches = batches_of(7)
    model = calibrated(batches, calibrator="minmax")
    seen = torch.cat(batches)
    edge = edge_quantizers(model)[0]
    low, high = seen.min(), seen.max()
    torch.testing.assert_close(edge.scale, ((high - low) / 255).reshape(1, 1))
    torch.testing.assert_close(edge.zero_point, torch.round(-low / edge.scale))
    weight = weight_quantizers(model)[0]
    steps = weight.module._parameters["weight"].abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(weight.fake_quant.scale, steps)
    assert all(edge.statistics is None for edge in edge_quantizers(model))


def test_activations_are_those_of_the_float_model() -> None:
    coarse = calibrated(batches_of(4), weight={"num_bits": 2})
    fine = calibrated(batches_of(4), weight={"num_bits": 8})
    for a, b in zip(edge_quantizers(coarse), edge_quantizers(fine), strict=True):
        assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(bad: float) -> None:
    batches = batches_of(3)
    batches[1][2, 3] = bad
    with pytest.raises(DataError, match=r"activations at edge 'input.*' hold NaN or infinite values"):
        calibrated(batches)
    model = Net()
    with torch.no_grad():
        model.second.weight[1, 1] = bad
    with pytest.raises(DataError, match=r"second.*NaN or infinite"):
        calibrated(batches_of(2), model)


def test_an_edge_that_no_batch_reaches_is_named_and_stays_float() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(torch.relu(hidden) if x.shape[0] == 5 else torch.sigmoid(hidden))

    recipe = build_recipe(library_config({}, exporting=False), PluginRegistry.load_installed())
    model = Branch()
    prepare(model, batches_of(1), Task(), recipe)
    missed = edge_quantizers(model)[1]
    notices = calibrate(model, [torch.randn(4, 6)], Task(), _quiet_trainer())
    assert f"edge '{missed.name}' was reached by no batch and stays in floating point" in notices
    assert not missed.enabled
    model(torch.randn(5, 6))


class OfAllValues(UniformQuantizer):
    needs = Histogram


def test_what_cannot_be_seen_in_one_pass_is_refused() -> None:
    spec = QuantSpec(num_bits=8, role=Role.ACTIVATION)
    slot = Slot(OfAllValues(), MovingAverageCalibrator(), PerLayer(), spec)
    with pytest.raises(RecipeError, match="cannot share one pass"):
        needed(slot)


CALIBRATORS = ("minmax", "moving_average", "kl")


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    states = {name: calibrated(Shard(batches_of(7)), calibrator=name).state_dict() for name in CALIBRATORS}
    torch.save(states, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_same_bits_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(r, str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    for name in CALIBRATORS:
        alone = calibrated(batches_of(7), calibrator=name).state_dict()
        for rank in range(2):
            state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            assert state.keys() == alone.keys()
            assert all(torch.equal(state[key], alone[key]) for key in state), (name, rank)

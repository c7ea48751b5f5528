from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qpipe.errors import DataError, RecipeError
from qpipe.stages import data as stage
from qpipe.stages.data import as_datamodule, calibration_batches, evaluation_batches

VALUES = torch.arange(20.0).reshape(20, 1)


class Module(LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(VALUES), batch_size=8, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(-VALUES), batch_size=8)


class Own(Module):
    def calibration_dataloader(self) -> list[Tensor]:
        return [VALUES[:3], VALUES[3:9]]


class ValidationOnly(LightningDataModule):
    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(VALUES, batch_size=5)


def values(batches: Iterable[Any]) -> list[float]:
    tensors = (batch[0] if isinstance(batch, list) else batch for batch in batches)
    return [x for tensor in tensors for x in tensor.flatten().tolist()]


def test_the_first_samples_are_read_in_order_and_none_is_dropped() -> None:
    batches = calibration_batches(Module(), 18)
    assert values(batches) == list(range(18))
    assert values(batches) == list(range(18))  # again the same
    assert len(batches) == 3
    assert values(calibration_batches(Module(), None)) == list(range(20))
    assert values(calibration_batches(Module(), 99)) == list(range(20))


def test_an_own_calibration_set_wins_and_its_last_batch_is_cut() -> None:
    assert values(calibration_batches(Own(), 5)) == [0, 1, 2, 3, 4]
    assert values(calibration_batches(Own(), None)) == list(range(9))


def test_evaluation_reads_the_test_set_or_else_the_validation_set() -> None:
    assert values(evaluation_batches(Module())) == [-x for x in range(20)]
    assert values(evaluation_batches(ValidationOnly())) == list(range(20))
    assert values(calibration_batches(ValidationOnly(), 7)) == list(range(7))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_batches_without_padding(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = calibration_batches(ValidationOnly(), None)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(stage, "process", lambda rank=rank: (rank, world))
        parts.append(values(batches))
        assert len(batches) == len(list(batches))
    assert sorted(x for part in parts for x in part) == list(range(20))
    assert parts[1][:5] == [5, 6, 7, 8, 9]  # the second batch


def test_data_may_be_a_tensor_batches_a_loader_or_a_generator() -> None:
    def generate() -> Iterator[Tensor]:
        yield from VALUES.split(6)

    for given in (VALUES, list(VALUES.split(6)), DataLoader(VALUES, 7), generate()):
        module = as_datamodule(given)
        assert values(calibration_batches(module, 13)) == list(range(13))
        assert values(evaluation_batches(module)) == list(range(20))
    module = Module()
    assert as_datamodule(module) is module


def test_batches_may_be_dicts() -> None:
    module = as_datamodule([{"x": VALUES, "name": "n", "y": VALUES}])
    [batch] = calibration_batches(module, 4)
    assert batch["x"].shape == batch["y"].shape == (4, 1)
    assert batch["name"] == "n"


@pytest.mark.parametrize(
    ("given", "count"), [([], 5), (VALUES[:0].split(4)[:0], 3), (DataLoader(VALUES[:0], 4), None)]
)
def test_nothing_to_calibrate_on_is_an_error(given: object, count: int | None) -> None:
    with pytest.raises(DataError, match="calibration set of GivenBatches is empty"):
        calibration_batches(as_datamodule(given), count)


@pytest.mark.parametrize("count", [0, -4, "many"])
def test_a_count_below_one_is_refused(count: Any) -> None:  # noqa: ANN401  # what a user may write
    with pytest.raises(RecipeError, match=f"num_samples={count} is no count of samples; give 1 or more"):
        calibration_batches(as_datamodule(DataLoader(VALUES, 4)), count)


def test_what_is_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="data is a str; give a LightningDataModule"):
        as_datamodule("digits")
    with pytest.raises(DataError, match="has neither train_dataloader nor val_dataloader"):
        calibration_batches(LightningDataModule(), 5)

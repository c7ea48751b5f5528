"""Which batches a run reads, and in which process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, distributed
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from qpipe.errors import DataError, RecipeError
from qpipe.task import Batches


def calibration_batches(data: LightningDataModule, num_samples: int | None) -> Batches:
    """Return the batches ranges are read from, num_samples in all.

    A data module's own calibration_dataloader() wins; otherwise the training set in its own order. Over
    several processes each reads every n-th batch: nothing is padded, so nothing is counted twice.

    Raises:
        RecipeError: num_samples is no count.
        DataError: there is nothing to calibrate on.
    """
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise RecipeError(
            f"data.calibration.num_samples={num_samples} is no count of samples; "
            "give 1 or more, or null for all"
        )
    _prepare(data, "fit")
    own = getattr(data, "calibration_dataloader", None)
    source = own() if own is not None else _first_of(data, "train_dataloader", "val_dataloader")
    batches = Shard(_first(source, num_samples))
    if next(iter(batches.all()), None) is None:
        wanted = "all of them" if num_samples is None else f"num_samples={num_samples}"
        raise DataError(
            f"the calibration set of {type(data).__name__} is empty ({wanted} asked for); "
            "give its train_dataloader() or calibration_dataloader() some samples"
        )
    return batches


def evaluation_batches(data: LightningDataModule) -> Batches:
    """Return the batches figures are read from: the test set, or else the validation set.

    Raises:
        DataError: there is neither.
    """
    stage = "test" if is_overridden("test_dataloader", data, LightningDataModule) else "validate"
    _prepare(data, stage)
    return Shard(_first(_first_of(data, "test_dataloader", "val_dataloader"), None))


def as_datamodule(data: Any) -> LightningDataModule:  # noqa: ANN401
    """Return data as a data module that calibrates and evaluates on it.

    Args:
        data: a data module, a DataLoader, an iterable of batches, or one tensor of samples.
    """
    if isinstance(data, LightningDataModule):
        return data
    if isinstance(data, Tensor):
        data = torch.split(data, 32)
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise DataError(
            f"data is a {type(data).__name__}; give a LightningDataModule, a DataLoader, batches or a tensor"
        )
    return GivenBatches(list(data) if isinstance(data, Iterator) else data)


class GivenBatches(LightningDataModule):
    """Serve the same batches for calibration, training and evaluation."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        several = isinstance(batches, (list, tuple))  # which Lightning would take for several loaders
        self.batches = DataLoader(batches, batch_size=None) if several else batches  # type: ignore[arg-type]

    def train_dataloader(self) -> Batches:
        """Return the batches."""
        return self.batches

    def val_dataloader(self) -> Batches:
        """Return the batches."""
        return self.batches


class Shard:
    """Serve every n-th batch to each of n processes; one process gets all of them.

    The process group is looked up when the batches are read, since Lightning starts it later than this.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def all(self) -> Batches:
        """Return the batches of every process."""
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        rank, world = process()
        return islice(iter(self.batches), rank, None, world)

    def __len__(self) -> int:
        if not isinstance(self.batches, Sized):
            raise TypeError("the number of batches is not known")
        rank, world = process()
        return len(range(rank, len(self.batches), world))


def process() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class _Cut:
    """Serve the first num_samples of given batches."""

    def __init__(self, batches: Batches, num_samples: int) -> None:
        self.batches = batches
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[Any]:
        left = self.num_samples
        for batch in self.batches:
            if left <= 0:
                return
            size = batch_size(batch)
            yield batch if size <= left else _head(batch, size, left)
            left -= size


def batch_size(batch: Any) -> int:  # noqa: ANN401
    """Return the first dimension of the first tensor in a batch; 1 if there is none."""
    sizes = (leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return next(sizes, 1)


def _head(batch: Any, size: int, count: int) -> Any:  # noqa: ANN401
    def cut(leaf: Any) -> Any:  # noqa: ANN401
        per_sample = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return leaf[:count] if per_sample else leaf

    return pytree.tree_map(cut, batch)


def _first(source: Any, num_samples: int | None) -> Batches:  # noqa: ANN401
    """Return the first samples of a loader in its dataset's order; of anything else, of its batches."""
    loaders = [source] if not _is_several(source) else list(source)
    ordered = [_unshuffled(loader) for loader in loaders]
    if len(ordered) == 1 and num_samples is not None and isinstance(ordered[0], DataLoader):
        dataset = ordered[0].dataset
        if isinstance(dataset, Sized) and ordered[0].batch_size is not None:
            return _unshuffled(ordered[0], Subset(dataset, range(min(num_samples, len(dataset)))))
    batches = ordered[0] if len(ordered) == 1 else _Chain(ordered)
    return batches if num_samples is None else _Cut(batches, num_samples)


class _Chain:
    """Serve several loaders one after the other."""

    def __init__(self, loaders: Sequence[Batches]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.loaders)


def _is_several(source: Any) -> bool:  # noqa: ANN401
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return is_list and all(isinstance(loader, DataLoader) for loader in source)


def _unshuffled(loader: Batches, dataset: Dataset[Any] | None = None) -> Batches:
    """Return the loader reading its dataset (or the given one) in order, the last batch kept."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return loader
    return DataLoader(
        loader.dataset if dataset is None else dataset,  # an empty one is false, and still the one asked for
        loader.batch_size,
        shuffle=False,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(0),  # without one, each pass draws from the user's global one
    )


def _prepare(data: LightningDataModule, stage: str) -> None:
    data.prepare_data()
    data.setup(stage)


def _first_of(data: LightningDataModule, *names: str) -> Any:  # noqa: ANN401
    for name in names:
        if is_overridden(name, data, LightningDataModule):
            return getattr(data, name)()
    raise DataError(f"{type(data).__name__} has neither {' nor '.join(names)}(); add one")

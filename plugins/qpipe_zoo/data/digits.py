"""Handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

TEST, VAL = 500, 200  # of 1,797


class Digits(LightningDataModule):
    """Split scikit-learn's 1,797 digits into 1,097 for training, 200 for validation and 500 for test.

    Batches are (images [B, 1, 8, 8] from 0 to 1, labels [B]); the split is stratified and always the same.

    Args:
        batch_size: images a batch.
        num_workers: processes that load; 0 loads in this one.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.datasets: dict[str, Dataset[tuple[Tensor, ...]]] = {}

    def fingerprint(self) -> str:
        """Name the data: the split never changes."""
        return "sklearn-digits-1097-200-500"

    def setup(self, stage: str | None = None) -> None:
        """Read the images and split them."""
        if self.datasets:
            return
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        rest, test = train_test_split(range(len(labels)), test_size=TEST, random_state=0, stratify=labels)
        train, val = train_test_split(rest, test_size=VAL, random_state=0, stratify=labels[rest])
        x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
        y = torch.from_numpy(labels).long()
        parts = {"train": train, "val": val, "test": test}
        self.datasets = {name: TensorDataset(x[index], y[index]) for name, index in parts.items()}

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            self.datasets[part],
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches for training."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches for validation."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches for test."""
        return self._loader("test")

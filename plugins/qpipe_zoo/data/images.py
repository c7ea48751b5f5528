"""Anyone's own pictures, without labels."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from qpipe import DataError
from qpipe_zoo.image import normalize, read_image, resize, square

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class Pictures(Dataset[Tensor]):
    """Read pictures, cut to their central square.

    Args:
        paths: of the files.
        size: side after resizing.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return normalize(resize(square(read_image(self.paths[index])), self.size))


class Images(LightningDataModule):
    """Serve a folder's pictures [B, 3, size, size], values (pixel - 127) / 128; every second one calibrates.

    Args:
        path: the folder, searched with its sub-folders.
        batch_size: pictures a batch.
        size: side of the square they are resized to.
        num_workers: processes that load.
    """

    def __init__(self, path: str, batch_size: int = 16, size: int = 224, num_workers: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.batch_size = batch_size
        self.size = size
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures.

        Raises:
            DataError: there are fewer than two.
        """
        found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if len(found) < 2:
            raise DataError(
                f"data.path={self.path} holds {len(found)} pictures ({', '.join(sorted(SUFFIXES))}); "
                "at least two are needed, one to calibrate and one to evaluate"
            )
        self.pictures = Pictures(found, self.size)

    def _loader(self, first: int) -> DataLoader[Tensor]:
        part = Subset(self.pictures, range(first, len(self.pictures), 2))
        return DataLoader(part, self.batch_size, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return every second picture, from the first."""
        return self._loader(0)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return every second picture, from the second."""
        return self._loader(1)

"""Crops of photos that ship with scikit-image, scikit-learn and foolbox."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qpipe_zoo.image import normalize, read_image, resize
from qpipe_zoo.optional import package_folder

# Split by photo, so that no scene is calibrated on and evaluated.
CALIBRATION = (
    "sklearn:flower.jpg",
    *(f"skimage:{name}" for name in ("rocket.jpg", "camera.png", "motorcycle_left.png", "coins.png")),
    *(f"skimage:{name}" for name in ("grass.png", "ihc.png", "page.png")),
)
EVALUATION = (
    "sklearn:china.jpg",
    *(
        f"skimage:{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "brick.png", "gravel.png")
    ),
    *(f"skimage:{name}" for name in ("retina.jpg", "hubble_deep_field.jpg", "moon.png", "color.png")),
)
_LABELS = (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
IMAGENET = tuple(f"foolbox:imagenet_{i:02}_{label}.jpg" for i, label in enumerate(_LABELS))
SOURCES = {  # those to calibrate on, those to evaluate on
    "scikit": (CALIBRATION, EVALUATION),
    "imagenet": (IMAGENET, (*CALIBRATION, *EVALUATION)),
    "both": ((*IMAGENET, *CALIBRATION), EVALUATION),
}
_FOLDERS = {"skimage": ("data",), "sklearn": ("datasets", "images"), "foolbox": ("data",)}


class Crops(Dataset[Tensor]):
    """Cut square crops, always the same ones, from photos.

    Args:
        photos: tensors [3, H, W] from 0 to 255.
        count: how many crops; photos take turns.
        size: side of a crop after resizing.
        seed: decides where crops lie.
        varied: crops from a quarter of the photo's side on, each colour brighter or darker, and every second
            one mixed with a crop of another photo: more kinds of pictures than there are photos.
    """

    def __init__(
        self, photos: Sequence[Tensor], count: int, size: int, seed: int, varied: bool = False
    ) -> None:
        self.photos = photos
        self.count = count
        self.size = size
        self.seed = seed
        self.varied = varied

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"crop {index} of {self.count}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        crop = self._crop(index, generator)
        return normalize(self._vary(crop, generator) if self.varied else crop)

    def _crop(self, number: int, generator: torch.Generator) -> Tensor:
        photo = self.photos[number % len(self.photos)]
        scale, down, right, flip = torch.rand(4, generator=generator).tolist()
        height, width = photo.shape[1:]
        least = 0.25 if self.varied else 0.5
        side = int(min(height, width) * (least + (1 - least) * scale))
        top, left = int((height - side) * down), int((width - side) * right)
        crop = photo[:, top : top + side, left : left + side]
        return resize(crop.flip(-1) if flip < 0.5 else crop, self.size)

    def _vary(self, crop: Tensor, generator: torch.Generator) -> Tensor:
        gain, offset = torch.rand(2, 3, 1, 1, generator=generator)
        crop = crop * (0.6 + 0.8 * gain) + 60 * (offset - 0.5)
        mixes, other, share = torch.rand(3, generator=generator).tolist()
        if mixes < 0.5:
            crop = torch.lerp(crop, self._crop(int(other * len(self.photos)), generator), share / 2)
        return crop.clamp(0, 255)


def read_photo(name: str) -> Tensor:
    """Read a photo by 'package:file' as [3, H, W] from 0 to 255."""
    package, file = name.split(":")
    return read_image(package_folder(package, "data=photos").joinpath(*_FOLDERS[package], file))


class Photos(LightningDataModule):
    """Serve crops [B, 3, size, size] without labels, photos for calibration and evaluation kept apart.

    Args:
        batch_size: crops a batch.
        size: side of a crop.
        num_calibration: crops to calibrate on.
        num_evaluation: crops to evaluate on, of other photos.
        num_workers: processes that load.
        source: 'scikit' calibrates on 8 photos of scikit-image and scikit-learn and evaluates on 10 others;
            'imagenet' calibrates on the 20 photos of ImageNet that foolbox ships and evaluates on those 18;
            'both' calibrates on the 20 and the 8 and evaluates on the 10.
        varied: calibrate on crops varied in size, colour and by mixing.
    """

    def __init__(
        self,
        batch_size: int = 16,
        size: int = 224,
        num_calibration: int = 256,
        num_evaluation: int = 256,
        num_workers: int = 0,
        source: str = "scikit",
        varied: bool = False,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"source is one of {', '.join(SOURCES)}, not {source!r}")
        self.batch_size = batch_size
        self.size = size
        self.counts = {"calibration": num_calibration, "evaluation": num_evaluation}
        self.num_workers = num_workers
        self.source = source
        self.varied = varied
        self.datasets: dict[str, Crops] = {}

    def fingerprint(self) -> str:
        """Name the data: the crops never change."""
        which = f"{self.source}-varied" if self.varied else self.source
        return f"photos-{which}-{self.size}-{self.counts['calibration']}-{self.counts['evaluation']}"

    def setup(self, stage: str | None = None) -> None:
        """Read the photos."""
        parts = dict(zip(("calibration", "evaluation"), SOURCES[self.source], strict=True))
        for seed, (part, names) in enumerate(parts.items()):
            if part not in self.datasets:
                photos = [read_photo(name) for name in names]
                varied = self.varied and part == "calibration"
                self.datasets[part] = Crops(photos, self.counts[part], self.size, seed, varied)

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Tensor]:
        return DataLoader(self.datasets[part], self.batch_size, shuffle=shuffle, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return crops of the calibration photos."""
        return self._loader("calibration", shuffle=True)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return crops of the evaluation photos."""
        return self._loader("evaluation")

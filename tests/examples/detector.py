r"""A small detector, as a user would bring it: inputs are a dict, outputs a tuple, loss and metric its own.

python -m qpipe model._target_=detector.Detector model.weights=detector.safetensors \
        data._target_=detector.Squares task._target_=detector.Detection
"""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from qpipe import Task

SIZE, CELLS = 32, 8  # pixels a side; cells a side, of which each says whether an object's centre lies in it

Batch = Mapping[str, Tensor]
Output = tuple[Tensor, Tensor]


class Detector(nn.Module):
    """Say for each cell how likely it holds a centre, and where and how large the object is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *self._stage(1, width),
            *self._stage(width, 2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.score = nn.Conv2d(2 * width, 1, 1)
        self.box = nn.Conv2d(2 * width, 4, 1)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, image: Tensor) -> Output:
        """Map images [B, 1, 32, 32] to scores [B, 8, 8] and boxes [B, 4, 8, 8]."""
        features = torch.relu(self.body(image))
        return self.score(features).squeeze(1), self.box(features)


class Squares(pl.LightningDataModule):
    """Noisy images with one bright rectangle each."""

    def __init__(self, num_samples: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.batch_size = batch_size

    def _images(self, seed: int) -> DataLoader[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        centre = 6 + 20 * torch.rand(self.num_samples, 2, generator=generator)
        side = 5 + 6 * torch.rand(self.num_samples, 2, generator=generator)
        pixel = torch.arange(SIZE) + 0.5
        rows = (pixel - centre[:, :1]).abs() < side[:, :1] / 2
        columns = (pixel - centre[:, 1:]).abs() < side[:, 1:] / 2
        images = (rows[:, :, None] & columns[:, None, :]).float()[:, None]
        images += 0.1 * torch.randn(images.shape, generator=generator)
        boxes = torch.cat([centre, side], 1) * CELLS / SIZE
        return DataLoader(
            [{"image": x, "box": box} for x, box in zip(images, boxes, strict=True)], self.batch_size
        )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._images(0)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._images(1)


def cells_of(batch: Batch) -> Tensor:
    """Return the number of the cell that holds the object's centre [B]."""
    row, column = batch["box"][:, :2].long().unbind(1)
    return row * CELLS + column


def boxes_at(boxes: Tensor, cells: Tensor) -> Tensor:
    """Return the boxes that given cells [B] predict, as centre and size on the whole grid [B, 4]."""
    box = boxes.flatten(2).gather(2, cells[:, None, None].expand(-1, 4, 1)).squeeze(2)
    corner = torch.stack([cells // CELLS, cells % CELLS], 1)
    return torch.cat([box[:, :2] + corner, box[:, 2:]], 1)


class IoU(Metric):
    """Average the overlap of the best-scored box with the true one, percent."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, output: Output, batch: Batch) -> None:
        scores, boxes = output
        box = boxes_at(boxes, scores.flatten(1).argmax(1))
        low = torch.maximum(box[:, :2] - box[:, 2:] / 2, batch["box"][:, :2] - batch["box"][:, 2:] / 2)
        high = torch.minimum(box[:, :2] + box[:, 2:] / 2, batch["box"][:, :2] + batch["box"][:, 2:] / 2)
        shared = (high - low).clamp(min=0).prod(1)
        areas = box[:, 2:].clamp(min=0).prod(1) + batch["box"][:, 2:].prod(1)
        self.total += (shared / (areas - shared)).sum()
        self.count += len(box)

    def compute(self) -> Tensor:
        return 100 * self.total / self.count


class Detection(Task):
    """Find the cell and the box; the scores are what variants are compared by."""

    def __init__(self) -> None:
        super().__init__(class_dim=None)

    def inputs(self, batch: Batch) -> tuple[tuple[()], dict[str, Tensor]]:
        return (), {"image": batch["image"]}

    def loss(self, output: Output, batch: Batch) -> Tensor:
        scores, boxes = output
        cells = cells_of(batch)
        return F.cross_entropy(scores.flatten(1), cells) + F.l1_loss(boxes_at(boxes, cells), batch["box"])

    def metrics(self) -> Mapping[str, Metric]:
        return {"iou_percent": IoU()}

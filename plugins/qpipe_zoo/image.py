"""Pictures as tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe import DataError


def read_image(file: Any) -> Tensor:  # noqa: ANN401  # a path, or a resource inside a package
    """Return a picture as [3, H, W] from 0 to 255.

    Raises:
        DataError: the file is no picture.
    """
    from PIL import Image

    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            width, height = image.size
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    except OSError as error:
        raise DataError(f"picture {file} cannot be read: {error}; remove it") from None
    return pixels.view(height, width, 3).permute(2, 0, 1).float()


def square(image: Tensor) -> Tensor:
    """Cut [3, H, W] to its central square."""
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


def resize(image: Tensor, size: int) -> Tensor:
    """Resize [3, H, W] to [3, size, size], bicubic, antialiased."""
    resized = F.interpolate(image[None], (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 255)


def normalize(image: Tensor) -> Tensor:
    """Map 0 .. 255 to what EfficientNet-Lite expects."""
    return (image - 127) / 128

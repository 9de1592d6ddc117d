"""Images in the forms in which users of the Python interface have them."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.types import Shape

Batch: TypeAlias = Tensor | np.ndarray | Sequence[Image.Image]


def as_tensor(batch: Batch, shape: Shape, levels: int | None) -> Tensor:
    """A batch as a tensor `(B, C, H, W)`.

    A tensor is taken as it is. An array may also have its channels last, `(B, H, W, C)`, or none,
    `(B, H, W)`. PIL images are made grey or RGB, and their values 0..255 become 0..Q-1 by
    `quantize`. They are not resized.

    Raises:
        ValueError: for PIL images of another size, or for a model of points.
    """
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, np.ndarray):
        if levels is None:
            raise ValueError("the model is of points, not of images: give a tensor or an array")
        batch = np.stack([_pixels(image, shape, levels) for image in batch])
    channels, *size = shape
    if batch.shape[1:] == (*size, channels) and batch.shape[1:] != shape:
        batch = batch.transpose(0, 3, 1, 2)
    elif batch.shape[1:] == tuple(size) and channels == 1:
        batch = batch[:, None]
    return torch.from_numpy(np.ascontiguousarray(batch))


def _pixels(image: Image.Image, shape: Shape, levels: int) -> np.ndarray:
    """uint8 `(H, W)` or `(H, W, C)`."""
    channels, height, width = shape
    if image.size != (width, height):
        raise ValueError(
            f"expected images of {width}x{height} pixels, got {image.width}x{image.height}: resize "
            f"them before"
        )
    return quantize(np.asarray(image.convert("L" if channels == 1 else "RGB")), levels)


def quantize(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Values 0..255 to 0..Q-1, uint8.

    256 levels keep the values, and 2**n levels their upper n bits, as `data.n_bits` does. Any other
    number Q takes round(v / 255 * (Q - 1)).
    """
    if levels & (levels - 1) == 0:
        reduced: np.ndarray = pixels >> (8 - (levels.bit_length() - 1))
        return reduced
    return np.round(pixels / 255 * (levels - 1)).astype(np.uint8)

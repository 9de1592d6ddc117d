"""Images and labels in the forms in which users of the Python interface have them."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowtrain.types import Shape

Labels: TypeAlias = Tensor | np.ndarray | Sequence[int]
Batch: TypeAlias = Tensor | np.ndarray | Sequence[Image.Image | np.ndarray]


def as_tensor(batch: Batch, shape: Shape, num_bins: int | None) -> Tensor:
    """A batch as a tensor `(B, C, H, W)`.

    A tensor is taken as it is, but points may also be `(B, D)`. An array may have its channels
    last, `(B, H, W, C)`, or none, `(B, H, W)`. A list is of arrays, or of PIL images. These are
    made grey or RGB (`as_shown`), and their values 0..255 become 0..Q-1 by `quantize`.

    Raises:
        ValueError: for another shape, or no example; for PIL images of another size, of
            floating-point pixels or for a model of points, and for a single one.
    """
    if isinstance(batch, Image.Image):
        raise ValueError("expected several images, got one: give a list, [image]")
    if not isinstance(batch, Tensor | np.ndarray):
        batch = np.stack(
            [_pixels(x, shape, num_bins) if isinstance(x, Image.Image) else x for x in batch]
        )
    channels, *size = shape
    if batch.ndim == 2 and (batch.shape[1], 1, 1) == shape:
        batch = batch[:, :, None, None]
    if isinstance(batch, np.ndarray):
        if batch.shape[1:] == (*size, channels) and batch.shape[1:] != shape:
            batch = batch.transpose(0, 3, 1, 2)
        elif batch.shape[1:] == tuple(size) and channels == 1:
            batch = batch[:, None]
        # Torch warns of arrays that it could write to but must not, such as mapped ones.
        batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
    if tuple(batch.shape[1:]) != shape or batch.ndim != 4 or not len(batch):
        raise ValueError(
            f"expected images of shape (B, {', '.join(map(str, shape))}), got {tuple(batch.shape)}"
        )
    return batch


def checked_labels(labels: Labels, classes: int, count: int) -> Tensor:
    """Labels as int64 `(count,)`. Raises `ValueError` unless they are integers in 0..classes-1.

    Torch takes indices of type bool or uint8 for a mask, so their type changes here.
    """
    labels = torch.as_tensor(labels)
    if not classes:
        raise ValueError("the model is not class-conditional: it has no labels")
    if labels.shape != (count,):
        raise ValueError(f"expected {count} labels, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"expected integers as labels, got {labels.dtype}")
    labels = labels.long()  # torch has no extremes of uint16
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"expected classes in 0..{classes - 1}, got {sorted(set(labels.tolist()))}"
        )
    return labels


def _pixels(image: Image.Image, shape: Shape, num_bins: int | None) -> np.ndarray:
    """uint8 `(H, W)` or `(H, W, C)`."""
    if num_bins is None:
        raise ValueError("the model is of points, not of images: give a tensor or an array")
    channels, height, width = shape
    image = as_shown(image, channels)
    if image.size != (width, height):
        raise ValueError(
            f"expected images of {width}x{height} pixels, got {image.width}x{image.height}: resize "
            f"them before"
        )
    return quantize(np.asarray(image), num_bins)


def as_shown(image: Image.Image, channels: int) -> Image.Image:
    """An image in grey (1 channel) or RGB. The EXIF orientation is applied, and transparency
    composited on white. 16-bit grey keeps its upper 8 bits, and a palette or CMYK becomes RGB.
    """
    mode = "L" if channels == 1 else "RGB"
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # here Pillow clips at 255, which would turn 16-bit images white
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("the image has floating-point pixels, of unknown range: save it as 8-bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def quantize(pixels: np.ndarray, num_bins: int) -> np.ndarray:
    """Values 0..255 to 0..Q-1, uint8.

    256 levels keep the values, and 2**n levels their upper n bits, as `data.n_bits` does. Any other
    number Q takes round(v / 255 * (Q - 1)).
    """
    if num_bins & (num_bins - 1) == 0:
        reduced: np.ndarray = pixels >> (8 - (num_bins.bit_length() - 1))
        return reduced
    return np.round(pixels / 255 * (num_bins - 1)).astype(np.uint8)

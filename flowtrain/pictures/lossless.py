"""Ordinary lossless formats: PNG, WebP and others that Pillow may have."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowtrain.pictures.grid import picture_of, to_8bit
from flowtrain.types import Shape


class Slow(NamedTuple):
    """An option and its value that make many files smaller still, and take far longer."""

    option: str
    value: int
    pixels: int  # of all images together, for which it is worth the time

    def __str__(self) -> str:
        return f"{self.option} {self.value}"


class Format(NamedTuple):
    """How Pillow writes a lossless format."""

    options: dict[str, Any]  # for a small file
    # Bytes that all images have in common. None for formats that archives and `complexity` do not
    # use.
    container: int | None = None
    slow: Slow | None = None


# A PNG's container has its signature, IHDR, IEND and the frame of IDAT; a WebP's has the RIFF
# header and the header of its one chunk. WebP's method is an effort from 0 to 6: on CIFAR-10,
# method 6 takes 50 to 100 times as long as 2 and needs more bits for one image: half a minute for
# 2**18 pixels. Pillow has JPEG XL only with a plugin. Its effort is 7 of 10 by default. Effort 10
# takes two minutes for 2**21 pixels.
FORMATS = {
    "PNG": Format({"optimize": True}, 8 + 25 + 12 + 12),
    "WEBP": Format(
        {"lossless": True, "quality": 100, "method": 2, "exact": True},
        12 + 8,
        Slow("method", 6, 2**18),
    ),
    "AVIF": Format({"quality": 100, "subsampling": "4:4:4"}),
    "JXL": Format({"lossless": True, "num_threads": 0}, slow=Slow("effort", 10, 2**21)),
}


def formats() -> list[str]:
    """The `FORMATS` that this Pillow writes and reads, with its plugin for JPEG XL if installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401
    return [name for name in FORMATS if name in Image.SAVE and name in Image.OPEN]


def coders() -> list[str]:
    """The formats in archives and of `complexity`: PNG, and WebP if this Pillow has it."""
    return [name for name in formats() if FORMATS[name].container is not None]


def png_files(
    names: Iterable[str], images: Iterable[Tensor], num_bins: int
) -> Iterator[tuple[str, bytes]]:
    """Images `(C, H, W)` as PNG files, with their names."""
    for name, image in zip(names, images, strict=True):
        yield name, encoded(to_8bit(image, num_bins), "PNG")


def encoded(image: Tensor, name: str, slow: bool = False) -> bytes:
    """An image `(C, H, W)`, uint8 with C = 1 or 3, as a file, perhaps with the `slow` option."""
    buffer = io.BytesIO()
    chosen = FORMATS[name]
    options = dict(chosen.options)
    if slow and chosen.slow:
        options[chosen.slow.option] = chosen.slow.value
    picture_of(image.numpy()).save(buffer, name, **options)
    return buffer.getvalue()


def decoded(data: bytes, shape: Shape, names: list[str]) -> Tensor:
    """The image of `shape` in a file of one of the formats `names`: the inverse of `encoded`.

    Raises `ValueError` for a picture of another format, size or mode, or what Pillow raises.
    """
    channels, height, width = shape
    try:
        opened = Image.open(io.BytesIO(data), formats=names)
    except UnidentifiedImageError:
        raise ValueError(f"no picture of the format {' or '.join(names)}") from None
    with opened as image:
        modes = ("RGB", "L") if channels == 1 else ("RGB",)
        if image.size != (width, height) or image.mode not in modes:
            raise ValueError(
                f"a picture of {image.width}x{image.height} {image.mode} instead of "
                f"{width}x{height}"
            )
        pixels = np.array(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    # WebP has no grey, but three equal channels
    return torch.from_numpy(pixels).movedim(-1, 0)[:channels]


def affordable(images: Tensor, name: str) -> bool:
    """Whether images `(N, C, H, W)` are few enough for the slow option of a format."""
    slow = FORMATS[name].slow
    return slow is not None and images[:, 0].numel() <= slow.pixels


def file_sizes(images: Tensor, num_bins: int, name: str, slow: bool = False) -> Tensor | None:
    """Bytes of each image of `(N, C, H, W)` as a file, `(N,)`; None if not all come back."""
    lengths = []
    for image in to_8bit(images, num_bins):
        file = encoded(image, name, slow)
        channels, height, width = image.shape
        if not torch.equal(decoded(file, (channels, height, width), [name]), image):
            return None
        lengths.append(len(file))
    return torch.tensor(lengths)


def complexity(images: np.ndarray) -> np.ndarray:
    """L(x): bits/dim of the shortest code of all coders, without its container, for uint8 images
    `(N, C, H, W)`: `(N,)`.

    The values are coded as they are, 0..Q-1, not stretched to 0..255.
    """
    available = coders()

    def shortest(image: Tensor) -> int:
        return min(
            len(encoded(image, coder)) - (FORMATS[coder].container or 0) for coder in available
        )

    with ThreadPoolExecutor() as pool:  # Pillow encodes without the GIL
        lengths = np.array(list(pool.map(shortest, torch.tensor(images))))
    return lengths * 8 / math.prod(images.shape[1:])

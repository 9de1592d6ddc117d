"""Ordinary lossless formats: PNG, WebP and what else Pillow has."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from flowtrain.pictures.grid import to_8bit

# Lossless formats, with what makes each small. WebP's method is an effort from 0 to 6: on CIFAR-10,
# 6 takes 50 times as long as 2 and needs more bits. (JPEG XL: where a plugin has told Pillow about
# it.)
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 2, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "JXL": {"lossless": True},
}


def formats() -> list[str]:
    """Those of `FORMATS` that this Pillow writes and reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.SAVE and name in Image.OPEN]


def encoded(image: Tensor, name: str) -> bytes:
    """An image `(C, H, W)`, uint8, C 1 or 3, as a file of a lossless format."""
    buffer = io.BytesIO()
    pixels = image.movedim(0, -1).contiguous().numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
        buffer, name, **FORMATS[name]
    )
    return buffer.getvalue()


def decoded(data: bytes, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `encoded`: an image of `shape`. Raises `ValueError` for another picture, or
    what Pillow raises.
    """
    channels, height, width = shape
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        if image.size != (width, height) or image.mode not in (
            "RGB",
            "L" if channels == 1 else "RGB",
        ):
            raise ValueError(
                f"a picture of {image.width}x{image.height} {image.mode} instead of "
                f"{width}x{height}"
            )
        pixels = np.array(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    # WebP has no grey: three equal channels
    return torch.from_numpy(pixels).movedim(-1, 0)[:channels]


def file_sizes(images: Tensor, levels: int, name: str) -> Tensor | None:
    """Bytes of each of the images `(N, C, H, W)` as a file of a format; None if it does not give
    all of them back.
    """
    lengths = []
    for image in to_8bit(images, levels):
        file = encoded(image, name)
        channels, height, width = image.shape
        if not torch.equal(decoded(file, (channels, height, width)), image):
            return None
        lengths.append(len(file))
    return torch.tensor(lengths)


# What Pillow is asked for, and the bytes of the file that are there whatever the image: a PNG's
# signature, IHDR, IEND and the frame of IDAT; a WebP's RIFF header and the header of its one chunk.
CODERS: dict[str, tuple[dict[str, Any], int]] = {
    "PNG": (FORMATS["PNG"], 8 + 25 + 12 + 12),
    "WEBP": (FORMATS["WEBP"], 12 + 8),
}


def coders() -> list[str]:
    """The coders that this Pillow has: PNG, and WebP unless it was built without."""
    return [name for name in CODERS if name == "PNG" or features.check(name.lower())]


def compressed_bytes(image: np.ndarray, coder: str) -> int:
    """The bytes that a coder needs for one image, uint8 `(C, H, W)`, without the constant ones of
    its container.
    """
    options, constant = CODERS[coder]
    buffer = io.BytesIO()
    picture_of(image).save(buffer, coder, **options)
    return buffer.tell() - constant


def picture_of(image: np.ndarray) -> Image.Image:
    """`(1, H, W)` in grey or `(3, H, W)` in colour."""
    return Image.fromarray(
        image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    )


def complexity(images: np.ndarray) -> np.ndarray:
    """L(x): bits/dim of the shortest of the lossless coders' codes, for uint8 `(N, C, H, W)`:
    `(N,)`.

    What is coded are the values as they are, 0..Q-1, not stretched to 0..255.
    """
    available = coders()

    def shortest(image: np.ndarray) -> int:
        return min(compressed_bytes(image, coder) for coder in available)

    with ThreadPoolExecutor() as pool:  # Pillow encodes without the GIL
        return np.array(list(pool.map(shortest, images))) * 8 / math.prod(images.shape[1:])

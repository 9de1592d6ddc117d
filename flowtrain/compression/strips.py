"""Images that are stored without a flow, as strips: a few of them, one above the other, in one
picture.

Nothing here may change within a version of the format.
"""

import functools
import zlib

import torch
from torch import Tensor

from flowtrain.compression.threads import Progress, Tick, in_threads, silent
from flowtrain.pictures.lossless import decoded, encoded, formats

STRIP = 64  # images per strip, at most
LONGEST = 16383  # pixels, of a WebP's side


def strip_length(height: int) -> int:
    """How many images of this height are in a strip, at most."""
    return min(STRIP, max(1, LONGEST // height))


def strips(images: Tensor, progress: Progress = silent) -> list[bytes]:
    """All images `(N, C, H, W)` in strips."""
    length = strip_length(images.shape[2])
    tasks = [functools.partial(_strip, part) for part in torch.split(images, length)]
    return in_threads(tasks, len(images), progress) if len(images) else []


def _strip(images: Tensor, tick: Tick) -> bytes:
    data = strip(images)
    tick(len(images))
    return data


def strip(images: Tensor) -> bytes:
    """Some images `(N, C, H, W)` in the fewest bytes: as WebP, as PNG, or deflated."""
    tall = images.movedim(1, 0).flatten(1, 2)
    candidates = [zlib.compress(images.contiguous().numpy().tobytes(), 9), encoded(tall, "PNG")]
    if "WEBP" in formats() and max(tall.shape) <= LONGEST:
        candidates.append(encoded(tall, "WEBP"))
    return min(candidates, key=len)


def unstrip(data: bytes, shape: tuple[int, int, int], count: int) -> Tensor:
    """The inverse of `strip`: `(count, C, H, W)`.

    Raises almost anything for bytes that `strip` did not make.
    """
    channels, height, width = shape
    if data[:1] == b"\x78":  # neither PNG nor WebP begins so
        size = count * channels * height * width
        inflate = zlib.decompressobj()
        pixels = inflate.decompress(data, size + 1)
        if len(pixels) != size or not inflate.eof:
            raise ValueError(f"not {count} images")
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(count, *shape)
    tall = decoded(data, (channels, count * height, width))
    return tall.view(channels, count, height, width).movedim(1, 0)

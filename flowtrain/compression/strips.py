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
PIECE = 2**20  # bytes that are inflated at a time


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


def unstrip(data: bytes, images: Tensor) -> None:
    """The inverse of `strip`: writes to `images`, `(N, C, H, W)`, uint8 and contiguous.

    Raises almost anything for bytes that `strip` did not make.
    """
    count, channels, height, width = images.shape
    if data[:1] == b"\x78":  # neither PNG nor WebP begins so
        _inflate(data, images.numpy().data.cast("B"))
    else:
        tall = decoded(data, (channels, count * height, width))
        images[:] = tall.view(channels, count, height, width).movedim(1, 0)


def _inflate(data: bytes, out: memoryview) -> None:
    """Fills `out`, piece by piece. Raises `ValueError` unless exactly so much is inflated."""
    inflate = zlib.decompressobj()
    done = 0
    while piece := inflate.decompress(data, PIECE):
        if done + len(piece) > len(out):
            break
        out[done : done + len(piece)] = piece
        done += len(piece)
        data = inflate.unconsumed_tail
    if piece or done != len(out) or not inflate.eof:
        raise ValueError(f"not {len(out)} bytes")

"""Images that are stored without a flow, as strips: pictures of a few images, one above the other.

Nothing here may change within a version of the format.
"""

import functools
import zlib

import torch
from torch import Tensor

from flowtrain.pictures.lossless import affordable, coders, decoded, encoded
from flowtrain.system.console import silent
from flowtrain.tools.archive.threads import Progress, Tick, in_threads

STRIP = 64  # images per strip, at most
LONGEST = 16383  # pixels, of a WebP's side
PIECE = 2**20  # bytes that are inflated at a time


def strip_length(height: int) -> int:
    """The most images of this height in a strip."""
    return min(STRIP, max(1, LONGEST // height))


def tall_length(height: int) -> int:
    """The most images of this height in a tall strip.

    A tall strip is at least twice as long as another one, or there are none.
    """
    length = LONGEST // height
    return length if length >= 2 * STRIP else strip_length(height)


def strips(images: Tensor, progress: Progress = silent) -> list[bytes]:
    """All images `(N, C, H, W)` in strips or tall strips, whichever take fewer bytes."""
    if not len(images):
        return []
    height, best = images.shape[2], affordable(images, "WEBP")
    lengths = sorted({strip_length(height), tall_length(height)})
    layouts = [torch.split(images, length) for length in lengths]
    if len(layouts[0]) == 1:
        layouts = layouts[:1]
    tasks = [functools.partial(_strip, part, best) for layout in layouts for part in layout]
    found = in_threads(tasks, len(layouts) * len(images), progress)
    short, tall = found[: len(layouts[0])], found[len(layouts[0]) :]
    return tall if tall and sum(map(len, tall)) < sum(map(len, short)) else short


def _strip(images: Tensor, best: bool, tick: Tick) -> bytes:
    data = strip(images, best)
    tick(len(images))
    return data


def strip(images: Tensor, best: bool = False) -> bytes:
    """Images `(N, C, H, W)` in the fewest bytes: as WebP (with `best`, also by method 6), PNG, or
    deflated.
    """
    tall = images.movedim(1, 0).flatten(1, 2)
    candidates = [zlib.compress(images.contiguous().numpy().tobytes(), 9), encoded(tall, "PNG")]
    if "WEBP" in coders() and max(tall.shape) <= LONGEST:
        efforts = (False, True) if best else (False,)
        candidates += [encoded(tall, "WEBP", slow) for slow in efforts]
    return min(candidates, key=len)


def unstrip(data: bytes, images: Tensor) -> None:
    """The inverse of `strip`: writes to `images`, `(N, C, H, W)`, uint8 and contiguous.

    It may raise almost anything for other bytes.
    """
    count, channels, height, width = images.shape
    if data[:1] == b"\x78":  # neither PNG nor WebP begins so
        _inflate(data, images.numpy().data.cast("B"))
    else:
        tall = decoded(data, (channels, count * height, width), coders())
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

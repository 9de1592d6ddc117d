"""Images that are stored without a flow, as strips: a few of them, one above the other, in one
picture.

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
    """How many images of this height are in a strip, at most."""
    return min(STRIP, max(1, LONGEST // height))


def tall_length(height: int) -> int:
    """How many images of this height are in a tall strip, at most.

    A tall strip is at least twice as long as another one, or there are none.
    """
    length = LONGEST // height
    return length if length >= 2 * STRIP else strip_length(height)


def strips(images: Tensor, progress: Progress = silent) -> list[bytes]:
    """All images `(N, C, H, W)` in strips or in tall strips, whichever take fewer bytes."""
    if not len(images):
        return []
    height, best = images.shape[2], affordable(images, "WEBP")
    layouts = [
        [functools.partial(_strip, part, best) for part in torch.split(images, length)]
        for length in sorted({strip_length(height), tall_length(height)})
    ]
    if len(layouts[0]) == len(layouts[-1]):  # there is only one strip
        layouts = layouts[:1]
    tasks = [task for layout in layouts for task in layout]
    parts = in_threads(tasks, len(layouts) * len(images), progress)
    first = len(layouts[0])
    return min([parts[:first], parts[first:] or parts[:first]], key=lambda p: sum(map(len, p)))


def _strip(images: Tensor, best: bool, tick: Tick) -> bytes:
    data = strip(images, best)
    tick(len(images))
    return data


def strip(images: Tensor, best: bool = False) -> bytes:
    """Some images `(N, C, H, W)` in the fewest bytes: as WebP, as PNG, or deflated.

    With `best`, WebP's method 6 is tried too.
    """
    tall = images.movedim(1, 0).flatten(1, 2)
    candidates = [zlib.compress(images.contiguous().numpy().tobytes(), 9), encoded(tall, "PNG")]
    if "WEBP" in coders() and max(tall.shape) <= LONGEST:
        efforts = (False, True) if best else (False,)
        candidates += [encoded(tall, "WEBP", slow) for slow in efforts]
    return min(candidates, key=len)


def unstrip(data: bytes, images: Tensor) -> None:
    """The inverse of `strip`: writes to `images`, `(N, C, H, W)`, uint8 and contiguous.

    Raises almost anything for bytes that `strip` did not make.
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

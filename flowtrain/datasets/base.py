"""What every data set returns (`Images`), held-out splits, and image files of any shape."""

import contextlib
import errno
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from flowtrain.errors import RunError, UserError, is_disk_full, short, shown
from flowtrain.system.files import open_regular
from flowtrain.types import Policy, Shape

Part = Literal["train", "test"]  # the parts that a data set itself has

# The formats that image files may have. EPS is left out, because Pillow starts Ghostscript for it,
# whatever the suffix of the file.
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Pixels(Protocol):
    """Images or points `(N, C, H, W)`: an array, or a `flowtrain.datasets.mapped.Mapped`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """The examples of a slice, or of an array of their numbers `(B,)`: `(B, C, H, W)`."""


def bytes_of_image(pixels: Pixels) -> int:
    """Bytes of one example, at least 1."""
    return max(1, math.prod(pixels.shape[1:]) * pixels.dtype.itemsize)


@dataclass(frozen=True)
class Images:
    """One part of a data set, described before any pixel is read or downloaded.

    shape: (C, H, W) of one image as stored.
    num_bins: Q, for values 0..Q-1. None for real-valued data.
    read: Downloads on first use, and returns the pixels: uint8 (N, C, H, W), or float32 for
        real-valued data. They are a C-contiguous array, or mapped read-only from files that may not
        fit into memory. Raises UserError or RunError.
    flip: Whether a mirrored image belongs to the same distribution. The default of `data.flip`.
    labels: Returns the classes of the same images, int64 (N,), from 0. None if there are none.
    names: Returns the files of the same images, below their folder. None for other data.
    key: Identifies the content if hashing the pixels would be slow. None: the pixels are hashed.
    rows: Returns the indices of the images of this part among the N. None: all of them.
    digests: Returns the result of `digests` for the pixels, if reading them all would be slow.
    at_hand: Whether `read` neither downloads nor decodes anything first.
    edition: One of several data sets of this name, printed beside every figure.
    """

    shape: Shape
    num_bins: int | None
    read: Callable[[], Pixels]
    flip: bool = False
    key: str | None = None
    labels: Callable[[], np.ndarray] | None = None
    names: Callable[[], list[str]] | None = None
    rows: Callable[[], np.ndarray] | None = None
    digests: Callable[[], np.ndarray] | None = None
    at_hand: Callable[[], bool] = lambda: True
    edition: str | None = None


def frozen_random(*key: int) -> np.random.RandomState:
    """A generator that depends on the key alone, in any version of numpy."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


HASHED = 2**24  # bytes of pixels that are hashed at a time


def digests(pixels: Pixels, rows: np.ndarray | None = None) -> np.ndarray:
    """128 bits of BLAKE2 for each example of `(N, ...)`, or for those at `rows`: uint8 `(N, 16)`.
    `pixels` may be larger than the memory.
    """
    found = bytearray()
    for part in _in_blocks(pixels, rows):
        examples = part.reshape(len(part), -1)
        found += b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in examples)
    return np.frombuffer(found, np.uint8).reshape(-1, 16)


def content(pixels: Pixels, rows: np.ndarray | None = None) -> str:
    """The SHA-256 of all examples of `(N, ...)`, or of those at `rows`, in C order."""
    found = hashlib.sha256()
    for part in _in_blocks(pixels, rows):
        found.update(part.data)
    return found.hexdigest()


def _in_blocks(pixels: Pixels, rows: np.ndarray | None) -> Iterator[np.ndarray]:
    """The examples at `rows`, by default all: some at a time, C-contiguous."""
    rows = np.arange(len(pixels)) if rows is None else rows
    each = max(1, HASHED // bytes_of_image(pixels))
    for start in range(0, len(rows), each):
        yield np.ascontiguousarray(pixels[rows[start : start + each]])


def first_equal(digests: np.ndarray) -> np.ndarray:
    """For each of N examples the index of the first equal one, `(N,)`."""
    found = np.arange(len(digests))
    # Examples whose first eight bytes are unique, nearly all, are equal to no other.
    beginnings = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    _, which, counts = np.unique(beginnings, return_inverse=True, return_counts=True)
    first: dict[bytes, int] = {}
    for i in np.flatnonzero(counts[which] > 1).tolist():
        found[i] = first.setdefault(digests[i].tobytes(), i)
    return found


def duplicates(first: np.ndarray) -> int:
    """Number of examples that are equal to an earlier one, from `first_equal`."""
    return int((first != np.arange(len(first))).sum())


def hold_out(first: np.ndarray, held: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits N examples into two sorted arrays of indices (kept, held), a function of the seed.

    `first` `(N,)` is the result of `first_equal`: equal images go to the same side. They are held
    out if the count has room for all of them, and otherwise kept. If there is room for none, the
    smallest group of equal images is held out. If all images are equal, they are split like others.
    `held` is a count from 0, or a fraction below 1, which is rounded to at least one image.

    Raises UserError if a count is no whole number, or if nothing would be kept.
    """
    n = len(first)
    if held >= 1 and held != int(held):
        raise UserError(f"cannot hold out {held} images: give a count, or a fraction below 1")
    count = int(held) if held >= 1 or held == 0 else max(1, round(n * held))
    if count >= n:
        raise UserError(f"cannot hold {shown(count)} of {n} images out: none is left to train on")
    order = frozen_random(seed).permutation(n)
    if not first.any():
        return np.sort(order[count:]), np.sort(order[:count])
    sizes = np.bincount(first, minlength=n)  # of the groups of equal images, at their first one
    groups = first[order]
    groups = groups[np.sort(np.unique(groups, return_index=True)[1])]  # in the seeded order
    out, room = np.zeros(n, bool), count
    for group in groups:
        if not room:
            break
        if sizes[group] <= room:
            out[group] = True
            room -= sizes[group]
    if count and not out.any():
        out[groups[np.argmin(sizes[groups])]] = True
    out = out[first]
    return np.flatnonzero(~out), np.flatnonzero(out)


def part_of(first: np.ndarray, part: Part, seed: int) -> np.ndarray:
    """The indices of a part of examples whose test split is a seeded tenth. `first` is from
    `first_equal`.
    """
    kept, held = hold_out(first, 0.1, seed)
    return kept if part == "train" else held


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Turns any error from the content of files into a `UserError` with this advice."""
    try:
        yield
    except (UserError, RunError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make zipfile, numpy and others raise anything
        if is_disk_full(error):
            raise
        raise UserError(f"{what} ({short(error)}): {advice}") from None


class OtherSize(UserError):
    """An image does not have the size for the policy `exact`."""


class Unreadable(UserError):
    """A file is no image, or a damaged one."""


def resize(image: Image.Image, shape: Shape, policy: Policy) -> np.ndarray:
    """An image as uint8 of `shape` (C, H, W), 0..255, where C is 1 (luma) or 3 (RGB).

    See `as_shown` for its mode. `crop` resamples the largest centred part with the right aspect
    ratio (Lanczos, antialiased), `stretch` the whole image. `exact` keeps the pixels, and raises
    OtherSize if the size differs.
    """
    from flowtrain.flow.inputs import as_shown  # imports torch

    channels, height, width = shape
    if policy == "exact" and sorted(image.size) != sorted((width, height)):
        raise _other_size(image, width, height)  # before a large image is decoded
    image = as_shown(image, channels)
    if policy == "exact" and image.size != (width, height):
        raise _other_size(image, width, height)
    box = (0.0, 0.0, float(image.width), float(image.height))
    if policy == "crop":
        box = _centre(image.size, (width, height))
    # Pillow's resize does not change images of the same size.
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def _other_size(image: Image.Image, width: int, height: int) -> OtherSize:
    return OtherSize(
        f"the image is {image.width}x{image.height} (width x height), not {width}x{height}: "
        "resize or crop it first"
    )


def _centre(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    scale = min(size[0] / target[0], size[1] / target[1])
    w, h = min(target[0] * scale, size[0]), min(target[1] * scale, size[1])
    left, top = (size[0] - w) / 2, (size[1] - h) / 2
    if scale == 1:  # nothing is resampled, and half a pixel off centre is better than a blur
        left, top = int(left), int(top)
    return left, top, left + w, top + h


@contextlib.contextmanager
def picture(source: Path | bytes) -> Iterator[Image.Image]:
    """Opens an image file in one of the formats `READABLE`, or its bytes. Raises the errors of
    `open_regular` and of Pillow. The checksums of a PNG are compared, because Pillow decodes some
    damaged files to other pixels.
    """
    name = f" '{source}'" if isinstance(source, Path) else ""
    with open_regular(source) if isinstance(source, Path) else io.BytesIO(source) as file:
        try:
            image = Image.open(file, formats=READABLE)
            if image.format == "PNG":
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=READABLE)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(f"cannot identify image file{name}") from None
        with image:
            yield image


def shorter_side(path: Path) -> int:
    """The shorter side of an image file that can be decoded, in pixels, from its header."""
    with open_regular(path) as file, Image.open(file, formats=READABLE) as image:
        return min(image.size)


def decode(source: Path | bytes, shape: Shape, policy: Policy) -> np.ndarray:
    """Reads an image file, or its bytes, as uint8 (C, H, W), 0..255. Raises the errors of `picture`
    and `resize`.
    """
    with picture(source) as image:
        if policy != "exact":  # a JPEG decodes much faster at a half, quarter or eighth of its size
            image.draft(None, (2 * max(shape[1:]),) * 2)
        return resize(image, shape, policy)


def decoded(source: Path | bytes, shape: Shape, policy: Policy) -> np.ndarray | str:
    """The result of `decode`, or the reason why the image cannot be read. Raises `OtherSize`, and
    `RunError` if the cause is the machine.
    """
    name = source if isinstance(source, Path) else "an image"
    try:
        return decode(source, shape, policy)
    except (OtherSize, MemoryError):
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE):
            raise RunError(f"{name} cannot be read ({short(error)})") from None
        why = " ".join(str(error).split()).replace(f" '{name}'", "").rstrip(":")
        return why[:200] or type(error).__name__


def open_image(path: Path, shape: Shape, num_bins: int, policy: Policy = "crop") -> np.ndarray:
    """Reads a user's image file as uint8 (C, H, W), with values 0..num_bins-1 from `quantize`.

    Raises:
        Unreadable: that names the path.
        OtherSize: that names the path.
        RunError: if the cause is the machine.
    """
    from flowtrain.flow.inputs import quantize  # imports torch

    try:
        pixels = decoded(path, shape, policy)
    except OtherSize as error:
        raise OtherSize(f"{path}: {error}") from None
    if not isinstance(pixels, str):
        return quantize(pixels, num_bins)
    if not os.path.exists(path):  # noqa: PTH110 (never raises)
        raise Unreadable(f"{path}: there is no such image file")
    if path.is_dir():
        raise Unreadable(f"{path} is a folder: give an image file")
    raise Unreadable(f"{path} cannot be read as an image ({pixels})")

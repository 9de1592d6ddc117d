"""A user's own arrays in one .npz file, with the names of Keras: x_train, x_test, y_train, y_test.
All but x_train are optional.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from flowtrain.datasets.base import Images, Part, contiguous, digests, first_equal, part_of
from flowtrain.errors import UserError, cut, short
from flowtrain.system.files import open_regular
from flowtrain.types import Shape

Layout = Literal["nhwc", "nchw"]


def build(root: Path, split: Part, *, seed: int = 0, path: Path, layout: Layout = "nhwc") -> Images:
    """uint8 images with 256 levels from x_train and x_test, with classes from y_train and y_test.

    Args:
        path: The .npz file. Without x_test, a seeded tenth of x_train is the test split.
        layout: Order of the axes. (N, H, W) is grey in either layout. C is 1 or 3.

    Only the headers inside the file are read here. `read` takes the whole array into memory.
    Raises `UserError` that names the file and the key. `root` is not used.
    """
    path = Path(path).expanduser()
    with _opened(path) as archive:
        keys = sorted(name.removesuffix(".npy") for name in archive.namelist())
        if "x_train" not in keys:
            raise UserError(
                f"data.path: {path} has no array x_train (it has "
                f"{cut(', '.join(keys)) or 'nothing'}): save it with np.savez(path, x_train=..., "
                "x_test=...)"
            )
        for key in ("x_train", "x_test", "y_train", "y_test"):
            if keys.count(key) > 1:
                raise UserError(
                    f"data.path: {path} has {keys.count(key)} arrays {key}: save it again with one"
                )
        count, train = _shape(path, archive, "x_train", layout)
        own_test = "x_test" in keys
        counts = {"train": count}
        if own_test:
            counts["test"], test = _shape(path, archive, "x_test", layout)
            if test != train:
                raise UserError(
                    f"data.path: in {path}, the images of x_train are {_by(train)} and those of "
                    f"x_test {_by(test)}: they have to be of one size"
                )

        if not own_test and count < 2:
            raise UserError(
                f"data.path: {path} has one image, which cannot be split: add more, or x_test"
            )

    part = "test" if own_test and split == "test" else "train"

    def read() -> np.ndarray:
        pixels = _array(path, f"x_{part}")
        if pixels.ndim == 4 and layout == "nhwc":
            pixels = pixels.transpose(0, 3, 1, 2)
        return contiguous(pixels.reshape(-1, *train))  # (N, C, H, W)

    def rows() -> np.ndarray:
        return part_of(first_equal(digests(read())), split, seed)

    def labels() -> np.ndarray:
        key = f"y_{part}"
        values = _array(path, key)
        if values.dtype.kind not in "iu" or values.size != counts[part]:
            raise UserError(
                f"data.path: {key} in {path} is {values.dtype} of shape {values.shape}: expected "
                f"a whole number for "
                f"each of the {counts[part]} images"
            )
        return values.reshape(-1).astype(np.int64)

    return Images(
        shape=train,
        levels=256,
        read=read,
        labels=labels if f"y_{part}" in keys else None,
        rows=None if own_test else rows,
    )


def _array(path: Path, key: str) -> np.ndarray:
    with _opened(path) as archive, _member(path, archive, key) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at the end of the member, zipfile compares its checksum
    return values


def _shape(path: Path, archive: zipfile.ZipFile, key: str, layout: Layout) -> tuple[int, Shape]:
    """N and (C, H, W) of an array, from its header alone."""
    with _member(path, archive, key) as file:
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, _, dtype = header(file)
        there = archive.getinfo(f"{key}.npy").file_size - file.tell()
    where = f"data.path: {key} in {path}"
    if dtype != np.uint8:
        raise UserError(
            f"{where} has the type {dtype}, not uint8: convert it to whole numbers 0..255 with "
            f".astype(np.uint8)"
        )
    if there != math.prod(shape):
        raise UserError(f"{where} is damaged: it has {there} bytes for an array {cut(str(shape))}")
    from flowtrain.system import capacity  # imports torch

    # In the order of channels that training takes, it is a copy.
    taken = there * (2 if layout == "nhwc" and len(shape) == 4 else 1)
    if taken > capacity.total() // 2:
        raise UserError(
            f"{where} takes {taken / 2**30:.1f} GiB, more than half of the memory of this machine"
        )
    if len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])
        n, *image = shape
    elif len(shape) == 4:
        n, *image = shape if layout == "nchw" else (shape[0], shape[3], shape[1], shape[2])
    else:
        raise UserError(
            f"{where} has the shape {shape}: images are (N, H, W), (N, H, W, C), or (N, C, H, W) "
            f"with data.layout: nchw"
        )
    if image[0] not in (1, 3):
        other = "nhwc" if layout == "nchw" else "nchw"
        fits = shape[1 if other == "nchw" else 3] in (1, 3)
        hint = f": set data.layout: {other}" if fits else ", where 1 or 3 are allowed"
        raise UserError(
            f"{where} has the shape {shape}, which is {image[0]} channels in the layout "
            f"{layout}{hint}"
        )
    if n == 0 or 0 in image:
        raise UserError(f"{where} has the shape {shape}: it holds no pixels")
    return n, (image[0], image[1], image[2])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(f"data.path: there is no file {path}") from None
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be opened ({short(error)})") from None
    with file:
        try:
            archive = zipfile.ZipFile(file)
        except MemoryError:
            raise
        except Exception:  # a damaged directory of the archive makes zipfile raise almost anything
            raise UserError(
                f"data.path: {path} is not an .npz file, or is cut short: save it again with "
                f"np.savez"
            ) from None
        with archive:
            yield archive


@contextlib.contextmanager
def _member(path: Path, archive: zipfile.ZipFile, key: str) -> Iterator[IO[bytes]]:
    try:
        with archive.open(f"{key}.npy") as file:
            yield file
    except MemoryError:
        raise UserError(f"data.path: {key} in {path} does not fit into memory") from None
    except Exception as error:  # damaged bytes make zipfile, numpy and the codecs raise anything
        raise UserError(
            f"data.path: {key} in {path} is damaged or not a plain array ({short(error)}): copy "
            f"or save the file again"
        ) from None


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape[1:])) + f" with {shape[0]} channel(s)"

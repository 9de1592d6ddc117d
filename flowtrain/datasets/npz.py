"""A user's own arrays: x_train, and maybe x_test, y_train and y_test, as in Keras."""

import functools
import logging
import math
import re
import zlib
from pathlib import Path

import numpy as np

from flowtrain.datasets import cache
from flowtrain.datasets.base import HASHED, Images, Part, Pixels, digests, first_equal, part_of
from flowtrain.datasets.mapped import Layout, Mapped, Piece, channels_first, piece
from flowtrain.errors import UserError, cut, short
from flowtrain.system.arrays import ONLY, ArrayFile, Stored
from flowtrain.types import Shape

log = logging.getLogger("flowtrain")

KEYS = ("x_train", "x_test", "y_train", "y_test")
PART = re.compile(rf"({'|'.join(KEYS)})(?:-([0-9]+))?\.npy")  # a file in a folder
UNNAMED = "arr_0"  # by `np.savez(path, images)`, as in the files of samples of the ADM suite
MAPPED = 2**26  # bytes; arrays that are at least as large are mapped
KEY = "data.path: "  # before messages


def build(root: Path, split: Part, *, seed: int = 0, path: Path, layout: Layout = "nhwc") -> Images:
    """uint8 images with 256 levels from x_train and x_test, with classes from y_train and y_test.

    Args:
        path: An .npz file, or a folder with x_train.npy or its parts x_train-0.npy, x_train-1.npy,
            ... and the like, or one .npy file. An array without a name is x_train. Without x_test,
            a seeded tenth of x_train is the test split.
        layout: Order of the axes. (N, H, W) is grey in either layout. C is 1 or 3.

    Only headers are read here. Uncompressed arrays of `MAPPED` bytes or more are memory-mapped.
    Before their first use, all bytes are read, compared with the checksum of the .npz file, and
    hashed. `read` takes any other array into memory. Raises `UserError`. `root` is not used.
    """
    arrays = _arrays(path)
    if "x_train" not in arrays:
        there = ", ".join(sorted(arrays)) or "nothing"
        advice = "save it with np.savez(path, x_train=..., x_test=...)"
        if path.is_dir():
            advice = "save it there with np.save as x_train.npy, or in parts as x_train-0.npy, ..."
        raise UserError(f"data.path: {path} has no array x_train (it has {cut(there)}): {advice}")
    counts: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for key in ("x_train", "x_test"):
        if key in arrays:
            counts[key], shapes[key] = _counted(arrays[key], layout)
    own_test = "x_test" in arrays
    shape = shapes["x_train"]
    if own_test and shapes["x_test"] != shape:
        raise UserError(
            f"data.path: in {path}, the images of x_train are {_by(shape)} and of x_test "
            f"{_by(shapes['x_test'])}: they have to be of one size"
        )
    if not own_test and counts["x_train"] < 2 and split == "train":
        raise UserError(
            f"data.path: {path} has one image, which cannot be split: add more, or x_test"
        )
    part = "test" if own_test and split == "test" else "train"
    x, y = arrays[f"x_{part}"], arrays.get(f"y_{part}")
    mapped = sum(each.bytes for each in x) >= MAPPED and all(each.offset is not None for each in x)
    if not mapped:
        _require_memory(x, layout)

    @functools.cache
    def remembered() -> np.ndarray:
        return _digests(x, layout)

    def read() -> Pixels:
        if mapped:
            remembered()  # it notices damage
            return Mapped([_piece(each, layout) for each in x])
        each = [channels_first(array.file.values(array.name), layout) for array in x]
        return np.ascontiguousarray(np.concatenate(each) if len(each) > 1 else each[0])

    def rows() -> np.ndarray:
        found = remembered() if mapped else digests(read())
        return part_of(first_equal(found), split, seed)

    def labels() -> np.ndarray:
        assert y is not None
        count = counts[f"x_{part}"]
        numbers = sum(math.prod(each.shape) for each in y)
        if any(each.dtype.kind not in "iu" for each in y) or numbers != count:
            shown = ", ".join(f"{each.dtype} of shape {each.shape}" for each in y)
            raise UserError(
                f"data.path: y_{part} in {path} is {cut(shown)}: expected a whole number for each "
                f"of the {count} images"
            )
        parts = [each.file.values(each.name).reshape(-1) for each in y]
        return np.concatenate([values.astype(np.int64) for values in parts])

    return Images(
        shape=shape,
        num_bins=256,
        read=read,
        labels=labels if y is not None else None,
        rows=None if own_test else rows,
        digests=remembered if mapped else None,
    )


# --- headers --------------------------------------------------------------------------------------


def _arrays(path: Path) -> dict[str, list[Stored]]:
    """The arrays at a path, by name. The parts of an array in a folder are in order."""
    if path.is_dir():
        return _arrays_of_folder(path)
    file = ArrayFile(path, KEY)
    if file.names == [ONLY]:
        return {"x_train": [file.header(ONLY)]}
    known = {key: [file.header(key)] for key in KEYS if key in file.names}
    if not known and UNNAMED in file.names:
        return {"x_train": [file.header(UNNAMED)]}
    return known or {name: [] for name in file.names}


def _arrays_of_folder(folder: Path) -> dict[str, list[Stored]]:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise UserError(f"data.path: {folder} cannot be listed ({short(error)})") from None
    files = [name for name in names if name[0] != "." and name.endswith(".npy")]
    parts = {name: match for name in files if (match := PART.fullmatch(name))}
    found: dict[str, list[Stored]] = {name: [] for name in files if name not in parts}
    for name in sorted(parts, key=lambda name: (int(parts[name][2] or 0), name)):
        header = ArrayFile(folder / name, KEY).header(ONLY)
        found.setdefault(parts[name][1], []).append(header)
    both = [key for key in KEYS if f"{key}.npy" in parts and len(found[key]) > 1]
    if both:
        raise UserError(f"data.path: {folder} has {both[0]}.npy and parts of it: remove either")
    for key in KEYS:
        numbers = sorted(int(match[2]) for match in parts.values() if match[1] == key and match[2])
        first = min([1, *numbers])
        if numbers != [*range(first, first + len(numbers))]:
            raise UserError(
                f"data.path: {folder} has {len(numbers)} parts of {key}, numbered {numbers[0]} to "
                f"{numbers[-1]}: one is missing or there twice"
            )
    return found


def _counted(parts: list[Stored], layout: Layout) -> tuple[int, Shape]:
    """N and (C, H, W) of the images in the parts of an array."""
    counted = [_shape(each, layout) for each in parts]
    for each, (_, shape) in zip(parts, counted, strict=True):
        if shape != counted[0][1]:
            raise UserError(
                f"{each.where} has images of {_by(shape)}, and {parts[0].file.path.name} of "
                f"{_by(counted[0][1])}: they have to be of one size"
            )
    return sum(count for count, _ in counted), counted[0][1]


def _shape(array: Stored, layout: Layout) -> tuple[int, Shape]:
    """N and (C, H, W) of an array, from its header alone."""
    where, shape = array.where, array.shape
    if array.dtype != np.uint8:
        raise UserError(
            f"{where} has the type {array.dtype}, not uint8: convert it to whole numbers 0..255 "
            f"with .astype(np.uint8)"
        )
    if array.bytes != math.prod(shape):
        raise UserError(
            f"{where} is damaged: it has {array.bytes} bytes for an array {cut(str(shape))}"
        )
    if len(shape) == 3:
        n, *image = shape = (shape[0], 1, *shape[1:])
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


def _require_memory(parts: list[Stored], layout: Layout) -> None:
    """Raises `UserError` for an array that takes more than half of the memory."""
    from flowtrain.system import capacity  # imports torch

    # In the order of channels that training takes, it is a copy.
    copies = 2 if layout == "nhwc" and len(parts[0].shape) == 4 else 1
    taken = copies * sum(each.bytes for each in parts)
    if taken > capacity.total() // 2:
        raise UserError(
            f"{parts[0].where} takes {taken / 2**30:.1f} GiB, more than half of the memory of this "
            f"machine: save it with np.savez or np.save, which do not compress"
        )


# --- the values -----------------------------------------------------------------------------------


def _piece(array: Stored, layout: Layout) -> Piece:
    assert array.offset is not None
    with array.file.opened(array.name) as file:
        return piece(array.file.path, file, array.offset, array.shape, array.fortran, layout)


def _digests(parts: list[Stored], layout: Layout) -> np.ndarray:
    """The result of `base.digests` for mapped arrays, cached by path, size and time of the files.
    Raises `UserError` if the checksum of a zip is wrong.
    """
    names: list[str] = [layout]
    for each in parts:
        path, status = each.file.path.resolve(), each.file.path.stat()
        names += map(str, (path, status.st_size, status.st_mtime_ns, each.offset))
    known = cache.place() / "digests" / cache.key_of(["1", *names])

    def verify() -> None:
        log.info("reading all images of %s, once, to find equal ones", parts[0].file.path)
        for each in parts:
            if each.crc is not None:
                _verify(each)

    images = Mapped([_piece(each, layout) for each in parts])
    return cache.digests(known, images, str(parts[0].file.path), verify)


def _verify(array: Stored) -> None:
    assert array.offset is not None
    left, crc = array.header + array.bytes, 0
    with array.file.opened(array.name) as file:
        file.seek(array.offset - array.header)
        while left:
            read = file.read(min(left, HASHED))
            if not read:
                raise ValueError("it is cut short")
            crc, left = zlib.crc32(read, crc), left - len(read)
        if crc != array.crc:
            raise ValueError(f"bad CRC-32 {crc:08x}")


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape[1:])) + f" with {shape[0]} channel(s)"

"""A user's own folder of image files, which are decoded once into a memory-mapped cache."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flowtrain.datasets import base, cache
from flowtrain.datasets.base import Images, Part, Unreadable, first_equal, open_image, part_of
from flowtrain.errors import UserError, short
from flowtrain.types import Policy, Shape, Side

log = logging.getLogger("flowtrain")

LARGE = 10_000  # image files from which on the list of a tree is remembered
LONGEST_LIST = 2**31  # bytes; ten million files have fewer
COMPARED = 1000  # files of a remembered list that are compared with the tree
SETTLED = 2.0  # seconds after its last change, when the times of a folder can be relied on

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class File(NamedTuple):
    name: str  # relative to data.path, with "/"
    size: int
    mtime_ns: int
    mode: int  # so that chmod gives an unreadable file another chance


def build(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    path: Path,
    size: Side,
    channels: Literal[1, 3] = 3,
    resize: Policy = "crop",
) -> Images:
    """PNG, JPEG, WebP, BMP, GIF, TIFF and PPM images in any tree, as `channels` x `size` x `size`
    with 256 levels. Of an animation the first frame is taken.

    Args:
        path: The folder. `test/` in it is the test split, and `train/`, or else all the rest, the
            training split. Without `test/`, a seeded tenth of the training split is the test split.
            Names that begin with a dot are ignored; links are followed.
        size: Side of the square images in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: How an image is brought to that size: `crop` takes the largest centred square,
            `stretch` the whole image, and `exact` refuses images of another size.

    The tree is listed here (`files_of`). The first `read` decodes the files of the split, or all
    files if there is no `test/`, into the cache, whose key is made of the paths, sizes and times of
    the files, and of the options. A warning each time lists the files that cannot be decoded, which
    are left out, and counts the images that are smaller than `size`.

    Raises UserError for a folder without images, for sizes that differ under `exact`, and if the
    cache cannot be written.
    """
    folder = path.resolve()
    files, divided = _files(folder, split)
    shape: Shape = (channels, size, size)
    options = json.dumps([1, channels, size, resize])  # 1: the version of the cache
    # The cache must notice an edited file. The fingerprint must stay the same after a copy to
    # another machine.
    cached = cache.key_of([os.fspath(folder), options, *(repr(tuple(file)) for file in files)])
    named = files
    if divided:  # as if no images were equal, because none have been read
        named = [files[i] for i in part_of(np.arange(len(files)), split, seed)]
    content = cache.key_of([options, *(repr((file.name, file.size)) for file in named)])

    def target() -> Path:
        return cache.place() / "folder" / cached

    names = [file.name for file in files]
    enlarged: list[Path] = []

    def decode(path: Path) -> np.ndarray | str:
        try:
            image = base.decoded(path, shape, resize)
        except base.OtherSize as error:
            advice = "or set data.resize: crop"
            raise UserError(f"data.resize: exact, but {path}: {error}, {advice}") from None
        if not isinstance(image, str) and resize != "exact" and base.shorter_side(path) < size:
            enlarged.append(path)
        return image

    def counted(readable: np.ndarray) -> dict[str, bytes]:
        return {"enlarged.json": json.dumps([len(enlarged), len(readable)]).encode()}

    def decoded() -> tuple[np.ndarray, dict[str, str]]:
        paths = (folder / name for name in names)
        source = cache.Source(os.fspath(folder), "data.path", names, lambda: paths, decode, counted)
        return cache.opened(target(), names, shape) or cache.filled(target(), source, shape)

    def digests() -> np.ndarray:
        return cache.digests(target() / "digests", decoded()[0], f"images of {folder}")

    def part(unreadable: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the files of this part, and of all readable files."""
        readable = np.flatnonzero([file.name not in unreadable for file in files])
        first = np.arange(len(files))
        first[readable] = readable[first_equal(digests())]
        return part_of(first, split, seed) if divided else first, readable

    def rows() -> np.ndarray:
        own, readable = part(decoded()[1])
        return np.flatnonzero(np.isin(readable, own))

    def read() -> np.ndarray:
        images, unreadable = decoded()
        own = set(names)
        if unreadable and divided:
            own = {files[i].name for i in part(unreadable)[0]}
            unreadable = {name: why for name, why in unreadable.items() if name in own}
        what = f"{split} images in {folder}"
        cache.warn_of_unreadable(target(), unreadable, len(own), "data.path", what)
        few, of_all = json.loads(cache.remembered(target() / "enlarged.json", 100) or b"[0, 0]")
        if few:
            log.warning(
                "data.size: %d of %d images in %s have a side of less than %d pixels and are "
                "enlarged",
                *(few, of_all, folder, size),
            )
        return images

    def readable_names() -> list[str]:
        unreadable = decoded()[1]
        return [name for name in names if name not in unreadable]

    return Images(
        shape=shape,
        num_bins=256,
        read=read,
        names=readable_names,
        key=content,
        rows=rows if divided else None,
        digests=digests,
        at_hand=lambda: (target() / "index.json").exists(),
    )


def _files(folder: Path, split: Part) -> tuple[list[File], bool]:
    """The files of a part, and False. Without `test/`: all files to be divided, and True."""
    if not folder.is_dir():
        problem = f"{folder} is {'not a' if folder.exists() else 'no'} folder"
        raise UserError(f"data.path: {problem}; add data.path=DIR, the folder of your images")
    train, test = (folder / "train").is_dir(), (folder / "test").is_dir()
    if test:
        part = split if split == "test" or train else ""
        return files_of(folder, part, skip="" if part else "test"), False
    files = files_of(folder, "train" if train else "")
    if len(files) < 2:
        raise UserError(
            f"data.path: {folder} has one image, which cannot be split: add images, or folders "
            f"train/ and test/"
        )
    return files, True


def files_of(folder: Path, part: str, skip: str = "") -> list[File]:
    """The image files under folder/part, sorted by name in the same way on every machine. The
    cache keeps the list of a large tree.
    """
    known = cache.place() / "lists" / cache.key_of(["1", os.fspath(folder), part, skip])
    try:
        files = _remembered(known, folder) or _listed(known, folder, part, skip)
    except RecursionError:  # of `os.walk` before Python 3.12
        raise UserError(f"data.path: {folder / part} has folders too deep to list") from None
    if not files:
        raise UserError(
            f"data.path: there is no image in {folder / part} (looked for {', '.join(SUFFIXES)}, "
            f"in subfolders too)"
        )
    return files


def _remembered(known: Path, folder: Path) -> list[File] | None:
    """The list in the cache at `known`, unless the tree has changed. A new, renamed or removed file
    changes the time of its folder. An overwritten one does not, so a thousand files are compared as
    well.
    """
    data = cache.remembered(known, LONGEST_LIST)
    if data is None:
        return None
    content = json.loads(data)
    for name, mtime_ns in content["folders"]:
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_mtime_ns == mtime_ns:
                continue
        return None
    files = [File(*each) for each in content["files"]]
    some = files[:: -(-len(files) // COMPARED)]
    return files if all(_file(folder / file.name, file.name) == file for file in some) else None


def _listed(known: Path, folder: Path, part: str, skip: str) -> list[File]:
    """Lists a tree. The cache at `known` keeps the list of a large one."""
    started = time.time()

    def fail(error: OSError) -> None:
        raise UserError(f"data.path: {error.filename} cannot be listed ({short(error)})")

    files, seen = [], set()
    folders: list[tuple[str, int]] = []
    for here, inner, names in os.walk(folder / part, onerror=fail, followlinks=True):
        status = Path(here).stat()
        relative = Path(here).relative_to(folder)
        folders.append((relative.as_posix(), status.st_mtime_ns))
        if (status.st_dev, status.st_ino) in seen:  # links that form a circle
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        top = relative == Path()
        inner[:] = sorted(name for name in inner if name[0] != "." and not (top and name == skip))
        for name in names:
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:
                files.append(_file(Path(here, name), (relative / name).as_posix()))
    files.sort()
    # A folder that changes again at once may keep its time.
    settled = all(mtime_ns < (started - SETTLED) * 1e9 for _, mtime_ns in folders)
    if len(files) >= LARGE and settled:
        cache.remember(known, json.dumps({"folders": folders, "files": files}).encode())
    return files


def read_files(
    files: Sequence[Path],
    named: Collection[Path],
    option: str,
    shape: Shape,
    num_bins: int,
    policy: Policy,
) -> tuple[list[int], np.ndarray]:
    """Places in `files` and pixels of the image files that can be read: uint8 `(N, C, H, W)`.

    The others are left out, and a warning that begins with `option` lists them. A file that the
    user has `named` is never left out. Raises `UserError` as `open_image` does, or if none can be
    read.
    """
    x = np.empty((len(files), *shape), np.uint8)
    kept: list[int] = []
    left_out: dict[str, str] = {}

    def read(file: Path) -> np.ndarray | str:
        try:
            return open_image(file, shape, num_bins, policy)
        except Unreadable as error:
            if file in named:
                raise
            return str(error)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
        for i, image in enumerate(pool.map(read, files)):
            if isinstance(image, str):
                left_out[str(files[i])] = image.removeprefix(str(files[i])).lstrip(": ")
            else:
                x[len(kept)] = image
                kept.append(i)
    if not kept:
        name, why = next(iter(left_out.items()))
        raise UserError(f"{option}: no image can be read ({name}: {why})")
    cache.warn_of_unreadable(None, left_out, len(files), option, "images")
    return kept, x[: len(kept)]


def _file(path: Path, name: str) -> File:
    try:
        status = path.stat()
    except OSError:  # a dangling link: listed as unreadable when decoded
        return File(name, -1, 0, 0)
    return File(name, status.st_size, status.st_mtime_ns, status.st_mode)

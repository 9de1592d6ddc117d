"""A user's own folder of image files, which are decoded once into a memory-mapped cache."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from flowtrain.datasets import base
from flowtrain.datasets.base import Images, Part, Policy, first_equal, part_of
from flowtrain.errors import RunError, UserError, disk_full, is_disk_full, short
from flowtrain.system.files import open_regular, read_regular, write_atomically
from flowtrain.types import Shape, Side

log = logging.getLogger("flowtrain")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHUNK = 256  # images decoded ahead of the one being written
LONGEST_INDEX = 2**28  # bytes; a folder of a million unreadable files has fewer
LISTED = 50  # unreadable files named in a message; the cache's index.json has all of them
ABANDONED = 24 * 3600  # seconds after which an unfinished cache of another process is removed


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
    """PNG, JPEG, WebP and BMP images in any tree, as `channels` x `size` x `size` with 256 levels.

    Args:
        path: The folder. Its subfolder `test/` is the test split, and `train/` the training split,
            or all the rest if there is no `train/`. Without `test/`, a seeded tenth is the test
            split: a tenth of `train/` and nothing else if it exists, or else of all images. Names
            that begin with a dot are ignored, links are followed.
        size: Side of the square images in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: How an image is brought to that size: `crop` takes the largest centred square,
            `stretch` the whole image, and `exact` refuses images of another size.

    The tree is listed here. The first `read` decodes the files of the split, or all files if there
    is no `test/`, into `$FLOWTRAIN_CACHE`, or else `$XDG_CACHE_HOME/flowtrain`, or else
    `~/.cache/flowtrain`. The key of this cache is made of the paths, sizes and times of the files,
    and of the options. Files that cannot be decoded are left out. The logger `flowtrain` lists them
    as a warning each time.

    Raises UserError for a folder without images, for sizes that differ under `exact`, and if the
    cache cannot be written.
    """
    folder = Path(path).expanduser().resolve()
    if size < 1:
        raise UserError(f"data.size is {size}: give the side of the images in pixels")
    files, divided = _files(folder, split)
    shape: Shape = (channels, size, size)
    options = json.dumps([1, channels, size, resize])  # 1: the version of the cache
    # The cache must notice an edited file. The fingerprint must stay the same after a copy to
    # another machine.
    cached = _digest([os.fspath(folder), options, *(repr(tuple(file)) for file in files)])
    named = files
    if divided:  # as if no images were equal, because none has been read
        named = [files[i] for i in part_of(np.arange(len(files)), split, seed)]
    content = _digest([options, *(repr((file.name, file.size)) for file in named)])

    def target() -> Path:
        return _cache() / "folder" / cached

    def decoded() -> tuple[np.ndarray, dict[str, str]]:
        return _open(target(), files, shape) or _fill(target(), folder, files, shape, resize)

    def digests() -> np.ndarray:
        return _digests(target(), decoded()[0])

    def part(unreadable: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the files of this part, and of all files that are images of the cache."""
        readable = np.flatnonzero([file.name not in unreadable for file in files])
        first = np.arange(len(files))
        first[readable] = readable[first_equal(digests())]
        return part_of(first, split, seed) if divided else first, readable

    def rows() -> np.ndarray:
        own, readable = part(decoded()[1])
        return np.flatnonzero(np.isin(readable, own))

    def read() -> np.ndarray:
        images, unreadable = decoded()
        if unreadable and divided:
            own = {files[i].name for i in part(unreadable)[0]}
            count, unreadable = len(own), {n: why for n, why in unreadable.items() if n in own}
        else:
            count = len(files)
        if unreadable:
            lines = [f"  {name}: {why}" for name, why in list(unreadable.items())[:LISTED]]
            if len(unreadable) > LISTED:
                index = target() / "index.json"
                lines.append(f"  and {len(unreadable) - LISTED} more, see {index}")
            log.warning(
                "data.path: %d of %d %s images in %s cannot be read and are left out:\n%s",
                len(unreadable), count, split, folder, "\n".join(lines),
            )  # fmt: skip
        return images

    return Images(
        shape=shape,
        levels=256,
        read=read,
        key=content,
        rows=rows if divided else None,
        digests=digests,
        at_hand=lambda: (target() / "index.json").exists(),
    )


def _files(folder: Path, split: Part) -> tuple[list[File], bool]:
    """The files of a part, and False. If there is no `test/`: all files to be divided, and True."""
    if not folder.is_dir():
        raise UserError(f"data.path: {folder} is {'not a' if folder.exists() else 'no'} folder")
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
    """The image files under folder/part, sorted by name in the same way on every machine."""

    def fail(error: OSError) -> None:
        raise UserError(f"data.path: {error.filename} cannot be listed ({short(error)})")

    files, seen = [], set()
    for here, folders, names in os.walk(folder / part, onerror=fail, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:  # links that form a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        relative = Path(here).relative_to(folder)
        top = relative == Path()
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not (top and name == skip)
        )
        for name in names:
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:
                files.append(_file(Path(here, name), (relative / name).as_posix()))
    if not files:
        raise UserError(
            f"data.path: there is no image in {folder / part} (looked for {', '.join(SUFFIXES)}, "
            f"in subfolders too)"
        )
    return sorted(files)


def _file(path: Path, name: str) -> File:
    try:
        status = path.stat()
    except OSError:  # a dangling link: listed as unreadable when decoded
        return File(name, -1, 0, 0)
    return File(name, status.st_size, status.st_mtime_ns, status.st_mode)


def _digest(parts: Iterable[str]) -> str:
    text = "\0".join(parts)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _cache() -> Path:
    given = os.environ.get("FLOWTRAIN_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base_folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base_folder) if base_folder else Path.home() / ".cache") / "flowtrain"
    except RuntimeError:
        raise UserError("there is no home folder for the cache: set FLOWTRAIN_CACHE") from None


def _open(
    target: Path, files: list[File], shape: Shape
) -> tuple[np.ndarray, dict[str, str]] | None:
    """A finished cache of files, mapped read-only, with its unreadable files.

    None if it is absent or damaged.
    """
    try:
        index = json.loads(read_regular(target / "index.json", LONGEST_INDEX))
        unreadable: dict[str, str] = dict(index["unreadable"])
        known = unreadable.keys() <= {file.name for file in files}
        texts = all(isinstance(why, str) for why in unreadable.values())
        count = len(files) - len(unreadable)
        if index["count"] != count or not known or not texts:
            raise ValueError("index.json is not of these files")
        images = _mapped(target / "images.npy", (count, *shape))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("the image cache %s is damaged (%s): decoding again", target, short(error))
        return None
    return images, unreadable


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of uint8 in this shape. Raises `OSError`, and `ValueError` for any other file."""
    header = _header(shape)
    with open_regular(path) as file:
        if file.read(len(header)) != header:
            raise ValueError(f"{path.name} is not an array of shape {shape}")
        return np.memmap(file, np.uint8, "r", len(header), shape)


def _digests(target: Path, images: np.ndarray) -> np.ndarray:
    """What `base.digests` gives for the images of a cache, which remembers it."""
    known = target / "digests.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.array(_mapped(known, (len(images), 16)))
    found = base.digests(images)
    buffer = io.BytesIO()
    np.save(buffer, found)
    with contextlib.suppress(RunError):  # next time they are computed again
        write_atomically(known, buffer.getvalue())
    return found


def _fill(
    target: Path, folder: Path, files: list[File], shape: Shape, policy: Policy
) -> tuple[np.ndarray, dict[str, str]]:
    """Decodes into a folder of another name and renames it, so `target` is complete or absent."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(target.parent)
        log.info("decoding %d images of %s, once, into %s", len(files), folder, target)
        unreadable = _write(temporary / "images.npy", folder, files, shape, policy)
        count = len(files) - len(unreadable)
        if not count:
            listed = "; ".join(f"{name}: {why}" for name, why in list(unreadable.items())[:3])
            raise UserError(f"data.path: no image in {folder} can be read ({listed})")
        index = {"source": os.fspath(folder), "count": count, "unreadable": unreadable}
        (temporary / "index.json").write_text(json.dumps(index, indent=1))
        opened = _open(temporary, files, shape)
        assert opened is not None
        try:
            temporary.rename(target)
        except OSError:  # it exists: another process was faster, or it is the damaged one
            if _open(target, files, shape) is None:
                shutil.rmtree(target, ignore_errors=True)
                # If yet another process was faster, the open map still holds our copy.
                with contextlib.suppress(OSError):
                    temporary.rename(target)
        return opened
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(target.parent, error) from None
        raise UserError(
            f"the image cache {target.parent} cannot be written ({short(error)}): set the "
            "environment variable FLOWTRAIN_CACHE to a folder that can"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for entry in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [entry, *entry.iterdir()])
            if time.time() - newest > ABANDONED:
                shutil.rmtree(entry)


def _write(
    path: Path, folder: Path, files: list[File], shape: Shape, policy: Policy
) -> dict[str, str]:
    """Writes the readable images in order as .npy. Returns the other files, with the cause."""
    unreadable = {}
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,  # Pillow decodes without the GIL
        path.open("wb") as out,
    ):
        if policy == "exact":
            _check_sizes(pool, folder, files, shape)
        # Written in sequence, not through a map, where a full disk would be a SIGBUS.
        out.write(_header((len(files), *shape)))
        for start in _progress(range(0, len(files), CHUNK), len(files)):
            chunk = files[start : start + CHUNK]
            decoded = pool.map(lambda file: _decode(folder / file.name, shape, policy), chunk)
            for file, image in zip(chunk, decoded, strict=True):
                if isinstance(image, str):
                    unreadable[file.name] = image
                else:
                    out.write(image.tobytes())
        out.seek(0)  # numpy pads the header, so a smaller count fits into the same space
        out.write(_header((len(files) - len(unreadable), *shape)))
        out.flush()
        os.fsync(out.fileno())
    return unreadable


def _header(shape: tuple[int, ...]) -> bytes:
    """That of a .npy file of uint8."""
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _decode(path: Path, shape: Shape, policy: Policy) -> np.ndarray | str:
    """The image, or why it cannot be read."""
    try:
        return base.decode(path, shape, policy)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE):
            # The cause is the machine, not the file.
            raise RunError(f"{path} cannot be read ({short(error)})") from None
        why = " ".join(str(error).split()).replace(f" '{path}'", "").rstrip(":")
        return why[:200] or type(error).__name__


def _check_sizes(pool: ThreadPoolExecutor, folder: Path, files: list[File], shape: Shape) -> None:
    """Raises UserError if an image that can be opened does not have the size for `exact`."""
    wanted = shape[2], shape[1]

    def size(file: File) -> tuple[int, int]:
        try:
            with base.picture(folder / file.name) as image:
                return image.size
        except Exception:  # reported when it is decoded
            return wanted

    sizes = zip(files, pool.map(size, files), strict=True)
    wrong = [(file.name, found) for file, found in sizes if found != wanted]
    if wrong:
        name, (width, height) = wrong[0]
        raise UserError(
            f"data.size: {len(wrong)} of {len(files)} images in {folder} are not "
            f"{wanted[0]}x{wanted[1]}, the first {name} ({width}x{height}): set data.resize to "
            "crop or stretch"
        )


def _progress(chunks: range, total: int) -> Iterator[int]:
    """The starts of the chunks, with a progress bar on a terminal, or else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("decoding images", total=total)
            for start in chunks:
                yield start
                progress.update(task, completed=min(start + CHUNK, total))
        return
    said = time.monotonic()
    for start in chunks:
        yield start
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info("decoded %d of %d images", min(start + CHUNK, total), total)

"""The cache folder: decoded images, and a digest of each image.

A cache is complete or absent, and a damaged one is made again. The folder is `$FLOWTRAIN_CACHE`, or
else `$XDG_CACHE_HOME/flowtrain`, or else `~/.cache/flowtrain`.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from flowtrain.datasets import base
from flowtrain.datasets.base import Pixels
from flowtrain.errors import RunError, UserError, cut, disk_full, is_disk_full, short
from flowtrain.system.files import (
    new_folder,
    read_regular,
    remove_left_overs,
    require_regular,
    write_atomically,
)
from flowtrain.types import Shape

log = logging.getLogger("flowtrain")

CHUNK = 256  # images decoded ahead of the one being written
LONGEST_INDEX = 2**28  # bytes; a data set of a million unreadable images has fewer
LISTED = 50  # unreadable images named in a message; the cache's index.json has all of them
THREADS = min(16, os.cpu_count() or 1)  # Pillow decodes, and hashlib hashes, without the GIL
DIGEST = 16  # bytes of a digest


def place() -> Path:
    """The cache folder, which need not exist. Raises `UserError` if there is no home folder."""
    given = os.environ.get("FLOWTRAIN_CACHE")
    base_folder = os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser().absolute()
        return (Path(base_folder) if base_folder else Path.home() / ".cache") / "flowtrain"
    except RuntimeError:
        raise UserError("there is no home folder for the cache: set FLOWTRAIN_CACHE") from None


def key_of(parts: Iterable[str]) -> str:
    """A name for a cache that depends on all parts."""
    text = "\0".join(parts)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


# --- bytes with a checksum ------------------------------------------------------------------------


def sealed(data: bytes) -> bytes:
    """Bytes behind their SHA-256."""
    return hashlib.sha256(data).digest() + data


def remember(path: Path, data: bytes) -> None:
    """Writes bytes, sealed, if the cache can be written."""
    with contextlib.suppress(OSError, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sealed(data))


def remembered(path: Path, longest: int) -> bytes | None:
    """The sealed bytes at `path`, at most `longest`. None if they are absent or damaged."""
    try:
        stored = read_regular(path, 32 + longest)
        if stored[:32] != hashlib.sha256(stored[32:]).digest():
            raise ValueError("its checksum is wrong")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the cache %s is damaged (%s): making it again", path, short(error))
        return None
    return stored[32:]


def digests(
    path: Path, pixels: Pixels, what: str, verify: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The result of `base.digests` for all of `pixels`, which may be larger than the memory.
    Several threads hash them, once, after a call of `verify`. The cache at `path` keeps the result.
    """
    known = remembered(path, DIGEST * len(pixels))
    if known is not None and len(known) == DIGEST * len(pixels):
        return np.frombuffer(known, np.uint8).reshape(-1, DIGEST)
    verify()
    each = max(1, base.HASHED // base.bytes_of_image(pixels))  # images for a thread at a time
    few = THREADS * each

    def hashed(start: int) -> np.ndarray:
        return base.digests(pixels, np.arange(start, min(start + each, len(pixels))))

    parts: list[np.ndarray] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in progress(len(pixels), few, f"hashing {what}"):
            parts += pool.map(hashed, range(start, min(start + few, len(pixels)), each))
    found = np.concatenate(parts)
    remember(path, found.tobytes())
    return found


# --- decoded images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Images that are decoded once.

    where: The place of the originals, for messages.
    option: The key of the configuration that names it.
    names: The name of each image, in order, or its number.
    encoded: Gives the argument of `decode` for each image, in the same order.
    decode: Returns the image, uint8 (C, H, W), or why it cannot be read. Threads call it.
    also: Maps the indices of the readable images to further files of the cache: name and bytes to
        be sealed. It is called after the decoding.
    """

    where: str
    option: str
    names: Sequence[str | int]
    encoded: Callable[[], Iterable[Any]]
    decode: Callable[[Any], np.ndarray | str]
    also: Callable[[np.ndarray], dict[str, bytes]] = lambda readable: {}


def opened(
    target: Path, names: Sequence[str | int], shape: Shape
) -> tuple[np.ndarray, dict[str, str]] | None:
    """A finished cache of the images of these names, mapped read-only, with the unreadable ones.
    None if it is absent or damaged.
    """
    try:
        index = json.loads(read_regular(target / "index.json", LONGEST_INDEX))
        unreadable: dict[str, str] = dict(index["unreadable"])
        texts = all(isinstance(why, str) for why in unreadable.values())
        count = len(names) - len(unreadable)
        known = not unreadable or unreadable.keys() <= set(map(str, names))
        if index["count"] != count or not texts or not known:
            raise ValueError("index.json is not of these images")
        require_regular(target / "images.npy")
        images = np.lib.format.open_memmap(target / "images.npy", mode="r")
        plain = images.dtype == np.uint8 and images.flags.c_contiguous
        if not plain or images.shape != (count, *shape):
            raise ValueError("images.npy is not of these images")
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged header makes numpy raise almost anything
        log.warning("the image cache %s is damaged (%s): decoding again", target, short(error))
        return None
    return images, unreadable


def warn_of_unreadable(
    target: Path | None, unreadable: Mapping[str, str], count: int, option: str, what: str
) -> None:
    """Lists the images left out of `count`. `what` names all of them. The cache at `target` has the
    whole list.
    """
    if not unreadable:
        return
    shown = list(unreadable.items())[:LISTED]  # names may be of a stranger
    lines = [f"  {cut(name, 300)}: {cut(why, 300)}" for name, why in shown]
    if len(unreadable) > LISTED:
        where = "" if target is None else f", see {target / 'index.json'}"
        lines.append(f"  and {len(unreadable) - LISTED} more{where}")
    log.warning(
        "%s: %d of %d %s cannot be read and are left out:\n%s",
        option, len(unreadable), count, what, "\n".join(lines),
    )  # fmt: skip


def filled(target: Path, source: Source, shape: Shape) -> tuple[np.ndarray, dict[str, str]]:
    """Decodes into a folder of another name and renames it, so `target` is complete or absent.
    Raises `UserError` if no image can be read or the cache cannot be written, and what the
    functions of `source` raise.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(target.parent)
        log.info("decoding %d images of %s, once, into %s", len(source.names), source.where, target)
        with new_folder(target) as temporary:
            _fill(temporary, source, shape)
            try:
                temporary.rename(target)
            except OSError:  # it exists: another process was faster, or it is the damaged one
                if opened(target, source.names, shape) is None:
                    shutil.rmtree(target, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        temporary.rename(target)
            # If yet another process was faster, the open map holds our copy, even without its name.
            made = opened(target, source.names, shape) or opened(temporary, source.names, shape)
            assert made is not None
            return made
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(target.parent, error) from None
        raise UserError(
            f"the image cache {target.parent} cannot be written ({short(error)}): set the "
            "environment variable FLOWTRAIN_CACHE to another folder"
        ) from None


def _fill(folder: Path, source: Source, shape: Shape) -> None:
    """Writes all files of a cache. Raises `UserError` if no image can be read."""
    unreadable = _write(folder / "images.npy", source, shape)
    readable = np.flatnonzero([str(name) not in unreadable for name in source.names])
    if not len(readable):
        listed = "; ".join(f"{name}: {why}" for name, why in list(unreadable.items())[:3])
        raise UserError(f"{source.option}: no image in {source.where} can be read ({listed})")
    for name, data in source.also(readable).items():
        (folder / name).write_bytes(sealed(data))
    index = {"source": source.where, "count": len(readable), "unreadable": unreadable}
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def _write(path: Path, source: Source, shape: Shape) -> dict[str, str]:
    """Writes the readable images in order as .npy. Returns the others, with the cause."""
    unreadable = {}
    count = len(source.names)
    with ThreadPoolExecutor(THREADS) as pool, path.open("wb") as out:
        # Written in sequence, not through a map, where a full disk would be a SIGBUS.
        _write_header(out, (count, *shape))
        encoded = iter(source.encoded())
        for start in progress(count, CHUNK, "decoding images"):
            names = source.names[start : start + CHUNK]
            decoded = pool.map(source.decode, itertools.islice(encoded, CHUNK))
            for name, image in zip(names, decoded, strict=True):
                if isinstance(image, str):
                    unreadable[str(name)] = image
                else:
                    out.write(image.tobytes())
        out.seek(0)  # numpy pads the header, so a smaller count fits into the same space
        _write_header(out, (count - len(unreadable), *shape))
        out.flush()
        os.fsync(out.fileno())
    return unreadable


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def progress(total: int, each: int, what: str) -> Iterator[int]:
    """0, `each`, 2 `each` and so on below `total`, with a progress bar on a terminal, and elsewhere
    a line every ten seconds.
    """
    starts = range(0, total, each)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(starts, what, console=Console(stderr=True), transient=True)
        return
    printed = time.monotonic()
    for start in starts:
        yield start
        if time.monotonic() - printed > 10:
            printed = time.monotonic()
            log.info("%s: %d of %d", what, min(start + each, total), total)

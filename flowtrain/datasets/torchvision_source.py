"""Data sets that torchvision downloads: whatever goes wrong becomes one message."""

import contextlib
import io
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowtrain.datasets.base import Images, contiguous, disk_full, short
from flowtrain.errors import UserError, is_disk_full
from flowtrain.types import Shape

log = logging.getLogger("flowtrain")

TIMEOUT = 60.0  # seconds without a byte; torchvision itself would wait for ever

# The files of MNIST and of Fashion-MNIST, unpacked, in bytes: a header and a byte for each value.
IDX_SIZES = {
    "train-images-idx3-ubyte": 16 + 60000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60000,
    "t10k-images-idx3-ubyte": 16 + 10000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10000,
}


def images(
    name: str,
    root: Path,
    *,
    shape: Shape,
    count: int,
    load: Callable[[Any, str], Any],
    labels: Callable[[Any, str], Any],
    urls: Callable[[Any], Iterable[str]],
    files: Iterable[str],
    unpacked: Iterable[str],
    folder: str = "",
    sizes: Mapping[str, int] | None = None,
    flip: bool = False,
) -> Images:
    """A split that `torchvision.datasets.<name>` reads, and downloads if it is not under `root`.

    load: (class, root) -> `count` images of `shape`, uint8 (N, C, H, W).
    labels: (class, root) -> their classes, whole numbers from 0.
    urls: class -> where torchvision looks, for the message.
    files: what a user has to put into `root/folder` by hand, as downloaded.
    unpacked: what is in `root/folder` once it is downloaded and unpacked.
    sizes: bytes of those unpacked files that torchvision does not verify.
    """
    home = Path(root).expanduser().resolve()
    place = home / folder

    def guarded(load: Callable[[Any, str], Any], expected: tuple[int, ...]) -> np.ndarray:
        import torchvision.datasets

        source = getattr(torchvision.datasets, name)
        tried = " and ".join(urls(source))
        present = all((place / file).exists() for file in unpacked)
        if not present:
            log.info("%s is not in %s: downloading it from %s", name, place, tried)
        try:
            for file, size in (sizes or {}).items():
                if (place / file).exists() and (place / file).stat().st_size != size:
                    found = (place / file).stat().st_size
                    present = True
                    raise ValueError(f"{file} has {found} bytes, not {size}")
            with _patient():
                values = np.asarray(load(source, str(home)))
            if values.shape != expected:
                raise ValueError(f"they hold {values.shape}, not {expected}")
        except (ImportError, MemoryError):
            raise
        # URLError, RuntimeError, EOFError, zlib.error, AssertionError...
        except Exception as error:
            if is_disk_full(error):
                raise disk_full(place, error) from None
            wanted = f"{', '.join(files)} (as downloaded, not unpacked)"
            if present:
                raise UserError(
                    f"data.root: the {name} files in {place} are damaged ({short(error)}). "
                    f"Delete {', '.join(unpacked)} there and run again to download them from "
                    f"{tried}, or put good copies of {wanted} there by hand."
                ) from None
            raise UserError(
                f"data.root: {name} is not in {place} and could not be downloaded "
                f"({short(error)}). Tried {tried}; to do without a network, put {wanted} into "
                f"{place} by hand."
            ) from None
        return values

    def read() -> np.ndarray:
        return contiguous(guarded(load, (count, *shape)))

    def read_labels() -> np.ndarray:
        return guarded(labels, (count,)).astype(np.int64)

    return Images(shape=shape, levels=256, read=read, flip=flip, labels=read_labels)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """A time limit for the network, and torchvision's progress bar on a terminal only."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else quiet):
            yield
    finally:
        socket.setdefaulttimeout(before)

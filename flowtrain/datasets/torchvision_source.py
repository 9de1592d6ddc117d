"""Data sets that torchvision downloads. Whatever goes wrong becomes one message."""

import contextlib
import io
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowtrain.datasets.base import Images, Part
from flowtrain.errors import UserError, disk_full, is_disk_full, short
from flowtrain.system.files import require_regular
from flowtrain.types import Shape

log = logging.getLogger("flowtrain")

TIMEOUT = 60.0  # seconds without a byte; torchvision itself would wait forever

# Names and bytes of the unpacked files of MNIST and of Fashion-MNIST: a header, then one byte per
# value.
IDX_SIZES = {
    "train-images-idx3-ubyte": 16 + 60000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60000,
    "t10k-images-idx3-ubyte": 16 + 10000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10000,
}
IDX_COUNTS = {"train": 60000, "test": 10000}
CIFAR_COUNTS = {"train": 50000, "test": 10000}
SVHN_COUNTS = {"train": 73257, "test": 26032}


@dataclass(frozen=True)
class Files:
    """The files of a data set under `data.root`.

    downloaded: Names of the files as downloaded, which a user may put there by hand.
    unpacked: Names and bytes of the unpacked files. None if torchvision verifies the content.
    folder: Their place under `data.root`.
    """

    downloaded: Sequence[str]
    unpacked: Mapping[str, int | None]
    folder: str = ""


def mnist(root: Path, split: Part, *, seed: int = 0) -> Images:
    """MNIST handwritten digits: LeCun, Bottou, Bengio & Haffner, 1998.

    1x28x28 images: 60,000 for training, 10,000 for test, under `root/MNIST/raw`.
    """
    return idx("MNIST", root, split)


def fashion_mnist(root: Path, split: Part, *, seed: int = 0) -> Images:
    """Fashion-MNIST, clothes in the format of MNIST: Xiao, Rasul & Vollgraf, arXiv:1708.07747.

    1x28x28 images: 60,000 for training, 10,000 for test, under `root/FashionMNIST/raw`.
    """
    return idx("FashionMNIST", root, split)


def cifar10(root: Path, split: Part, *, seed: int = 0) -> Images:
    """CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    3x32x32 images: 50,000 for training, 10,000 for test; `root/cifar-10-batches-py`.
    """
    return cifar("CIFAR10", root, split, "cifar-10-python.tar.gz", "cifar-10-batches-py")


def cifar100(root: Path, split: Part, *, seed: int = 0) -> Images:
    """CIFAR-100: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    3x32x32 images: 50,000 for training, 10,000 for test; `root/cifar-100-python`.
    """
    return cifar("CIFAR100", root, split, "cifar-100-python.tar.gz", "cifar-100-python")


def svhn(root: Path, split: Part, *, seed: int = 0) -> Images:
    """Street View House Numbers, cropped digits: Netzer et al., 2011 (without `extra` images).

    3x32x32 images: 73,257 for training, 26,032 for test; `root/<split>_32x32.mat`.
    """

    def read(source: Any, home: str) -> tuple[Any, Any]:
        data = source(home, split=split, download=True)
        return data.data, data.labels

    file = f"{split}_32x32.mat"
    files, shape, count = Files([file], {file: None}), (3, 32, 32), SVHN_COUNTS[split]
    return images("SVHN", root, files, shape, count, read, lambda s: [s.split_list[split][0]])


BUILDS = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}


def idx(name: str, root: Path, part: Part) -> Images:
    """A data set in MNIST's format: 1x28x28, 60,000 images for training and 10,000 for test."""

    def read(source: Any, home: str) -> tuple[Any, Any]:
        data = source(home, train=part == "train", download=True)
        return data.data.numpy()[:, None], data.targets

    files = Files([f"{file}.gz" for file in IDX_SIZES], IDX_SIZES, f"{name}/raw")
    shape, count = (1, 28, 28), IDX_COUNTS[part]
    return images(name, root, files, shape, count, read, lambda source: source.mirrors)


def cifar(name: str, root: Path, part: Part, archive: str, unpacked: str) -> Images:
    """CIFAR-10 or CIFAR-100: 3x32x32, 50,000 images for training and 10,000 for test."""

    def read(source: Any, home: str) -> tuple[Any, Any]:
        data = source(home, train=part == "train", download=True)
        return data.data.transpose(0, 3, 1, 2), data.targets

    files = Files([archive], {unpacked: None})
    shape, count = (3, 32, 32), CIFAR_COUNTS[part]
    return images(name, root, files, shape, count, read, lambda source: [source.url], flip=True)


def images(
    name: str,
    root: Path,
    files: Files,
    shape: Shape,
    count: int,
    read: Callable[[Any, str], tuple[Any, Any]],
    urls: Callable[[Any], Iterable[str]],
    flip: bool = False,
) -> Images:
    """A split of `count` images (C, H, W) that `torchvision.datasets.<name>` reads or downloads.
    `read` maps the class and `root` to the images, uint8 (N, C, H, W), and to their classes from 0.
    `urls` maps the class to the addresses from which it downloads, for messages.
    """
    home = root.resolve()
    place = home / files.folder

    def at_hand() -> bool:
        return all((place / file).exists() for file in files.unpacked)

    def guarded(which: int, expected: tuple[int, ...]) -> np.ndarray:
        import torchvision.datasets

        source = getattr(torchvision.datasets, name)
        tried = " and ".join(urls(source))
        present = at_hand()
        if not present:
            log.info("%s is not in %s: downloading it from %s", name, place, tried)
        try:
            for file in (*files.downloaded, *files.unpacked):
                require_regular(place / file)
            for file, size in files.unpacked.items():
                found = (place / file).stat().st_size if (place / file).exists() else size
                if size is not None and found != size:
                    present = True
                    raise ValueError(f"{file} has {found} bytes, not {size}")
            with _patient():
                values = np.asarray(read(source, str(home))[which])
            if values.shape != expected:
                raise ValueError(f"they hold {values.shape}, not {expected}")
        except (ImportError, MemoryError):
            raise
        # URLError, RuntimeError, EOFError, zlib.error, AssertionError...
        except Exception as error:
            if is_disk_full(error):
                raise disk_full(place, error) from None
            wanted = f"{', '.join(files.downloaded)} (as downloaded, not unpacked)"
            if present:
                raise UserError(
                    f"data.root: the {name} files in {place} are damaged ({short(error)}). "
                    f"Delete {', '.join(files.unpacked)} there and run again to download them from "
                    f"{tried}, or put good copies of {wanted} there by hand."
                ) from None
            raise UserError(
                f"data.root: {name} is not in {place} and could not be downloaded "
                f"({short(error)}). Tried {tried}; to do without a network, put {wanted} into "
                f"{place} by hand."
            ) from None
        return values

    return Images(
        shape=shape,
        num_bins=256,
        read=lambda: np.ascontiguousarray(guarded(0, (count, *shape))),
        flip=flip,
        labels=lambda: guarded(1, (count,)).astype(np.int64),
        at_hand=at_hand,
    )


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Limits the time of the network, and shows torchvision's progress bar only on a terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else quiet):
            yield
    finally:
        socket.setdefaulttimeout(before)

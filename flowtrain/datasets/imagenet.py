"""ImageNet in 32x32 or 64x64 pixels. Two versions circulate, whose bits/dim do not compare.

- `oord2016`: van den Oord et al., "Pixel Recurrent Neural Networks", arXiv:1601.06759. Glow
  reports it, too. PNG files without classes, in .tar archives.
- `chrabaszcz2017`: Chrabaszcz et al., "A Downsampled Variant of ImageNet as an Alternative to the
  CIFAR datasets", arXiv:1707.08819. Arrays with classes, in .zip archives.

Numbers, sizes and SHA-256 of the archives are those that TensorFlow Datasets records for
`downsampled_imagenet` and `imagenet_resized`.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flowtrain.datasets import base, cache
from flowtrain.datasets.base import Images, Part
from flowtrain.errors import UserError
from flowtrain.system.arrays import array_of, header_of
from flowtrain.system.files import new_folder, open_regular
from flowtrain.types import Shape

log = logging.getLogger("flowtrain")

Version = Literal["oord2016", "chrabaszcz2017"]

CLASSES = 1000
PICKLES = ("*train_data_batch_[0-9]", "*/train_data_batch_[0-9]", "Imagenet??_*[!z].zip")
READ = 2**24  # bytes of an archive that are read at a time


@dataclass(frozen=True)
class Edition:
    """One version in one size.

    words: Its name, for messages.
    counts: Number of images of each part.
    archives: The files of each part, with their bytes and SHA-256.
    unpacked: The folder of PNG files of each part, or the pattern of its files of arrays.
    source: Where to get the archives.
    """

    words: str
    counts: Mapping[Part, int]
    archives: Mapping[Part, Mapping[str, tuple[int, str]]]
    unpacked: Mapping[Part, str]
    source: str


def _oord(side: int, train: tuple[int, str], test: tuple[int, str]) -> Edition:
    by = f"{side}x{side}"
    return Edition(
        f"ImageNet {by} of van den Oord et al. (2016), as in PixelRNN and Glow",
        {"train": 1_281_149, "test": 49_999},
        {"train": {f"train_{by}.tar": train}, "test": {f"valid_{by}.tar": test}},
        {"train": f"train_{by}", "test": f"valid_{by}"},
        "image-net.org/small no longer has them; a copy is accepted if its SHA-256 is right",
    )


def _chrabaszcz(side: int, train: Sequence[tuple[int, str]], test: tuple[int, str]) -> Edition:
    parts = [""] if len(train) == 1 else [f"_part{number}" for number in range(1, len(train) + 1)]
    names = [f"Imagenet{side}_train{part}_npz.zip" for part in parts]
    archives = dict(zip(names, train, strict=True))
    return Edition(
        f"ImageNet {side}x{side} of Chrabaszcz et al. (2017)",
        {"train": 1_281_167, "test": 50_000},
        {"train": archives, "test": {f"Imagenet{side}_val_npz.zip": test}},
        {"train": "train_data_batch_*.npz", "test": "val_data.npz"},
        "https://image-net.org/download-images has them for registered users, as npz format",
    )


EDITIONS: dict[tuple[int, Version], Edition] = {
    (32, "oord2016"): _oord(
        32,
        (4113018880, "244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5"),
        (161474560, "862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7"),
    ),
    (64, "oord2016"): _oord(
        64,
        (12112588800, "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7"),
        (477255680, "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd"),
    ),
    (32, "chrabaszcz2017"): _chrabaszcz(
        32,
        [(3580435279, "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc")],
        (139697668, "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a"),
    ),
    (64, "chrabaszcz2017"): _chrabaszcz(
        64,
        [
            (6783426789, "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1"),
            (6780506068, "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30"),
        ],
        (529522927, "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8"),
    ),
}


def _build(side: int) -> Callable[..., Images]:
    def build(root: Path, split: Part, *, seed: int = 0, version: Version) -> Images:
        return images(root, split, side, version)

    build.__doc__ = f"""ImageNet in {side}x{side} pixels, in one of the two versions that circulate.

    3x{side}x{side} images: 1.28 million for training, 50,000 for test; `root/imagenet{side}`.

    Args:
        version: Which of two data sets, whose bits/dim do not compare: by van den Oord et al.
            (PixelRNN, Glow), or by Chrabaszcz et al., with classes.

    The official validation images are the test split.
    """
    return build


BUILDS = {"imagenet32": _build(32), "imagenet64": _build(64)}


def images(root: Path, split: Part, side: int, version: Version) -> Images:
    """A part of a version of ImageNet, from the archives or their content in `root/imagenet<side>`.
    The first `read` compares archives with their SHA-256, and decodes them into the cache. Raises
    `UserError` if files are missing, or are not the official ones.
    """
    edition = EDITIONS[side, version]
    home = root.resolve() / f"imagenet{side}"
    count, shape = edition.counts[split], (3, side, side)

    def target() -> Path:
        stamp = _stamp(home, edition, split)
        return cache.place() / "imagenet" / f"{side}-{version}-{split}-{stamp}"

    @functools.cache
    def decoded() -> np.ndarray:
        folder = target()
        found = cache.opened(folder, range(count), shape)
        if found is not None:
            if version == "oord2016" or _labels(folder, count) is not None:
                return found[0]
            shutil.rmtree(folder, ignore_errors=True)
        with _source(home, side, version, split) as source:
            return cache.filled(folder, source, shape)[0]

    def labels() -> np.ndarray:
        decoded()
        found = _labels(target(), count)
        assert found is not None
        return found

    return Images(
        shape=shape,
        num_bins=256,
        read=decoded,
        flip=True,
        labels=labels if version == "chrabaszcz2017" else None,
        digests=lambda: cache.digests(target() / "digests", decoded(), edition.words),
        at_hand=lambda: (target() / "index.json").exists(),
        edition=f"{version}: {edition.words}, not comparable with {_other(version)}",
    )


def _other(version: Version) -> Version:
    return "oord2016" if version == "chrabaszcz2017" else "chrabaszcz2017"


def _labels(folder: Path, count: int) -> np.ndarray | None:
    """The labels in a cache, int64 (N,), if they are there."""
    known = cache.remembered(folder / "labels", 8 * count)
    return None if known is None or len(known) != 8 * count else np.frombuffer(known, np.int64)


def _stamp(home: Path, edition: Edition, split: Part) -> str:
    """A name for the files that are there, with their sizes and times."""
    parts = [os.fspath(home)]
    for path in (*_archives(home, edition, split), *_unpacked(home, edition, split)):
        with contextlib.suppress(OSError):
            status = path.stat()
            parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return cache.key_of(["1", *parts])


def _archives(home: Path, edition: Edition, split: Part) -> list[Path]:
    """The archives of a part, if all of them are there."""
    paths = [home / name for name in edition.archives[split]]
    return paths if all(path.exists() for path in paths) else []


def _unpacked(home: Path, edition: Edition, split: Part) -> list[Path]:
    """The folder of PNG files, or the files of arrays in order, in `home` or in a folder there."""
    pattern = edition.unpacked[split]
    found = [*home.glob(pattern), *home.glob(f"*/{pattern}")]
    return sorted(found, key=lambda path: _number(path.name))


def _number(name: str) -> int:
    """10 for `train_data_batch_10.npz`."""
    return int("".join(re.findall(r"_([0-9]{1,9})\.npz$", name)) or 0)


def _missing(home: Path, side: int, version: Version, split: Part) -> str:
    """The message if neither the archives nor their content is there."""
    edition = EDITIONS[side, version]
    wanted = " and ".join(edition.archives[split])
    unpacked = edition.unpacked[split]
    hint = ""
    other = EDITIONS[side, _other(version)]
    if _archives(home, other, split) or _unpacked(home, other, split):
        hint = f". The files of data.version {_other(version)} are there"
    elif any(any(home.glob(pattern)) for pattern in PICKLES):
        hint = ". The pickles there are never loaded, because a pickle can run code: take npz files"
    return (
        f"data.root: imagenet{side} of data.version {version} is not in {home}: put {wanted} there "
        f"(as downloaded), or {unpacked} (unpacked). Source: {edition.source}{hint}"
    )


def _verify(path: Path, size: int, sha256: str) -> None:
    """Raises `UserError` if an archive is not the official one."""
    log.info("comparing %s with its SHA-256, once", path)
    with _reading(path), open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise UserError(f"data.root: {path} has {found} bytes, not {size}: download it again")
        digest = hashlib.sha256()
        for _ in cache.progress(size, READ, f"comparing {path.name}"):
            digest.update(file.read(READ))
    if digest.hexdigest() != sha256:
        raise UserError(
            f"data.root: {path} is not the official file (its SHA-256 is {digest.hexdigest()}, not "
            f"{sha256}): download it again"
        )


def _reading(path: Path) -> contextlib.AbstractContextManager[None]:
    return base.reading(f"data.root: {path} cannot be read", "copy or unpack it again")


@contextlib.contextmanager
def _source(home: Path, side: int, version: Version, split: Part) -> Iterator[cache.Source]:
    """The images of a part, from the archives or else from their content."""
    edition = EDITIONS[side, version]
    archives, unpacked = _archives(home, edition, split), _unpacked(home, edition, split)
    if not archives and not unpacked:
        raise UserError(_missing(home, side, version, split))
    for path in archives:
        _verify(path, *edition.archives[split][path.name])
    shape, count = (3, side, side), edition.counts[split]
    names = range(count)
    if version == "oord2016":
        pictures = _in_tar(archives[0]) if archives else _in_folder(unpacked[0])
        with pictures as (members, encoded):
            if len(members) != count:
                where = archives[0] if archives else unpacked[0]
                raise UserError(f"data.root: {where} has {len(members)} PNG files, not {count}")
            decode = functools.partial(_decode, encoded, shape)
            yield cache.Source(os.fspath(home), "data.root", names, lambda: members, decode)
        return
    labels: list[np.ndarray] = []
    yield cache.Source(
        os.fspath(home),
        "data.root",
        names,
        lambda: _images(_in_zips(archives) if archives else unpacked, shape, count, labels),
        lambda image: image,
        lambda readable: {"labels": np.concatenate(labels).tobytes()},
    )


# --- PNG files ------------------------------------------------------------------------------------

Member = tuple[str, int, int]  # name; for a tar also where it begins, and its bytes
Encoded = Callable[[Member], Path | bytes]  # what `base.decode` takes


@contextlib.contextmanager
def _in_tar(path: Path) -> Iterator[tuple[list[Member], Encoded]]:
    """The PNG files in a tar that was verified, by name."""
    with open_regular(path) as file:
        members = []
        with _reading(path), tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # a million take a gigabyte
                if info.isreg() and info.name.endswith(".png"):
                    members.append((Path(info.name).name, info.offset_data, info.size))

        def encoded(member: Member) -> bytes:
            with _reading(path), open_regular(path) as own:  # a position of its own, for threads
                own.seek(member[1])
                return own.read(member[2])

        yield sorted(members), encoded


@contextlib.contextmanager
def _in_folder(path: Path) -> Iterator[tuple[list[Member], Encoded]]:
    with _reading(path), os.scandir(path) as entries:
        members = [(entry.name, 0, 0) for entry in entries if entry.name.endswith(".png")]
    yield sorted(members), lambda member: path / member[0]


def _decode(encoded: Encoded, shape: Shape, member: Member) -> np.ndarray:
    try:
        image = base.decoded(encoded(member), shape, "exact")
    except base.OtherSize as error:
        image = str(error)
    if isinstance(image, str):
        raise UserError(f"data.root: {member[0]} cannot be read ({image}): copy or unpack it again")
    return image


# --- arrays ---------------------------------------------------------------------------------------


def _in_zips(archives: Sequence[Path]) -> Iterator[Path]:
    """The .npz files in verified .zip archives, in order, each unpacked while it is used, because
    reading one goes back and forth.
    """
    for path in archives:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            found = [name for name in archive.namelist() if name.endswith(".npz")]
            for name in sorted(found, key=_number):
                file_name = Path(name).name
                with new_folder(cache.place() / "imagenet" / file_name) as folder:
                    unpacked = folder / file_name
                    with archive.open(name) as member, unpacked.open("wb") as out:
                        shutil.copyfileobj(member, out, READ)
                    yield unpacked


def _images(
    files: Iterable[Path], shape: Shape, count: int, labels: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """The images in .npz files with the arrays `data` and `labels`, uint8 (C, H, W). The labels,
    from 0, are appended to `labels`, int64. Raises `UserError` unless there are `count`.
    """
    total = 0
    for path in files:
        with _reading(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            with archive.open("labels.npy") as member:
                values = array_of(member)
            if values.dtype.kind not in "iu" or values.min() < 1 or values.max() > CLASSES:
                raise ValueError(f"its labels are not the whole numbers 1..{CLASSES}")
            labels.append(values.reshape(-1).astype(np.int64) - 1)
            with archive.open("data.npy") as member:
                size, fortran, dtype = header_of(member)
                if size != (values.size, math.prod(shape)) or fortran or dtype != np.uint8:
                    raise ValueError(f"its array data is {dtype} of shape {size}")
                total += values.size
                if total > count:
                    raise ValueError(f"there are more than {count} images")
                for start in range(0, values.size, cache.CHUNK):
                    some = min(cache.CHUNK, values.size - start)
                    block = member.read(some * math.prod(shape))
                    yield from np.frombuffer(block, np.uint8).reshape(some, *shape)
                member.read(1)  # at the end of the member, zipfile compares its checksum
    if total != count:
        raise UserError(f"data.root: there are {total} images, not {count}: files are missing")

"""Image data sets in the format of Hugging Face's package `datasets`: from their hub, or on disk.

No code of a data set is run. The package, from its version 4 on, runs none, and flowtrain decodes
the images itself.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowtrain.datasets import base, cache
from flowtrain.datasets.base import Images, Part, first_equal, part_of
from flowtrain.errors import UserError, cut
from flowtrain.system import packages
from flowtrain.system.files import require_regular
from flowtrain.types import Policy, Shape, Side

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of a data set on the hub


def build(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    repository: str | None = None,
    path: Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    image: str = "image",
    label: str | None = None,
    size: Side,
    channels: Literal[1, 3] = 3,
    resize: Policy = "crop",
) -> Images:
    """Any image data set of the hub, as `channels` x `size` x `size` with 256 levels. It needs
    the package `datasets`.

    Args:
        repository: Its name on the hub, such as `ylecun/mnist`. Give either this or `path`.
        path: A folder written by `save_to_disk`. Give either this or `repository`.
        subset: Which of several configurations of a repository.
        revision: A branch, a tag or a commit of the repository. Only a commit never changes.
        train_split: Name of the split to train on.
        test_split: Name of the split to test with. With null, a seeded tenth of `train_split` is
            the test split.
        image: Name of the column of images.
        label: Name of a column of classes, whole numbers from 0. With null there are none.
        size: Side of the square images in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: How an image is brought to that size: `crop` takes the largest centred square,
            `stretch` the whole image, and `exact` refuses images of another size.

    The first `read` downloads, and decodes the images into the cache. Images that cannot be decoded
    are left out, with a warning. Raises `UserError` if the data cannot be loaded.
    """
    if (repository is None) == (path is None):
        given = "neither is given" if path is None else "both are given"
        raise UserError(f"data.repository: give either this or data.path: {given}")
    own_test = test_split is not None
    wanted = test_split if split == "test" and test_split is not None else train_split
    shape: Shape = (channels, size, size)
    place, option = (repository, "data.repository") if path is None else (path, "data.path")

    @functools.cache
    def loaded() -> Any:
        rows = (
            _on_disk(Path(path), wanted, f"data.{split if own_test else 'train'}_split")
            if path is not None
            else _from_hub(repository or "", subset, revision, wanted)
        )
        _require_columns(rows, image, label)
        return rows

    def target() -> Path:
        files = [Path(each["filename"]) for each in loaded().cache_files]
        facts = [(os.fspath(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        # Several splits may be parts of the same files.
        rows = [repository, subset, revision, wanted, len(loaded())]
        options = json.dumps([2, rows, image, channels, size, resize, facts])
        return cache.place() / "hub" / cache.key_of([options])

    where = f"{place} ({wanted})"
    decode = functools.partial(_decode, shape=shape, policy=resize)

    @functools.cache
    def decoded() -> tuple[np.ndarray, dict[str, str]]:
        names = range(len(loaded()))
        source = cache.Source(where, option, names, lambda: _encoded(loaded(), image), decode)
        return cache.opened(target(), names, shape) or cache.filled(target(), source, shape)

    def read() -> np.ndarray:
        images, unreadable = decoded()
        what = f"images of {where}"
        cache.warn_of_unreadable(target(), unreadable, len(loaded()), option, what)
        return images

    def digests() -> np.ndarray:
        return cache.digests(target() / "digests", decoded()[0], f"images of {place}")

    def labels() -> np.ndarray:
        assert label is not None
        values = np.array(loaded().select_columns([label])[:][label])
        if values.dtype.kind not in "iu":
            raise UserError(f"data.label: {label} of {place} has rows without a whole number")
        unreadable = decoded()[1]
        readable = [i for i in range(len(values)) if str(i) not in unreadable]
        return values[readable].astype(np.int64)

    return Images(
        shape=shape,
        num_bins=256,
        read=read,
        labels=None if label is None else labels,
        rows=None if own_test else lambda: part_of(first_equal(digests()), split, seed),
        digests=digests,
        at_hand=lambda: path is not None and (target() / "index.json").exists(),
    )


def _package() -> Any:
    datasets = packages.required("data.name: hub", "datasets", (4,), extra="hub")
    import huggingface_hub  # which datasets depends on

    # What goes wrong is one message of flowtrain.
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def _on_disk(path: Path, wanted: str, option: str) -> Any:
    """A split of a data set in a folder. `option` is the key that names the split."""
    datasets = _package()
    advice = "give a folder that save_to_disk of the package datasets has written"
    with base.reading(f"data.path: {path} cannot be loaded", advice):
        require_regular(path)
        found = datasets.load_from_disk(os.fspath(path), keep_in_memory=False)
    if isinstance(found, datasets.Dataset):
        if option == "data.test_split":
            raise UserError(f"{option}: {path} has no splits; with null, a tenth is held out")
        return found
    if wanted not in found:
        raise UserError(f"{option}: {path} has no split {cut(wanted)}, but {cut(', '.join(found))}")
    return found[wanted]


def _from_hub(repository: str, subset: str | None, revision: str | None, wanted: str) -> Any:
    if not NAME.fullmatch(repository):
        raise UserError(f"data.repository: {cut(repository)} is not a hub name, OWNER/NAME")
    if Path(repository).exists():  # the package would load it instead
        raise UserError(
            f"data.repository: {repository} is also a file or folder here: start in another folder "
            f"(data.path is for a data set on disk)"
        )
    load = _package().load_dataset
    advice = "without a network, save_to_disk elsewhere, and give data.path"
    what = f"data.repository: {repository} (split {cut(wanted)}) cannot be loaded"
    with base.reading(what, advice):
        rows: Any = load(repository, subset, split=wanted, revision=revision, keep_in_memory=False)
    return rows


def _require_columns(rows: Any, image: str, label: str | None) -> None:
    pictures = [n for n, kind in rows.features.items() if type(kind).__name__ == "Image"]
    classes = [n for n, kind in rows.features.items() if "int" in str(getattr(kind, "dtype", ""))]
    wanted = (("image", image, pictures, "images"), ("label", label, classes, "whole numbers"))
    for option, column, there, content in wanted:
        if column is not None and column not in there:
            raise UserError(
                f"data.{option}: {cut(column)} is not a column of {content}; there is "
                f"{cut(', '.join(there)) or 'none'}"
            )


def _encoded(rows: Any, image: str) -> Iterator[dict[str, Any]]:
    """The files of the images, as bytes or as a path."""
    files = rows.select_columns([image]).cast_column(image, _package().Image(decode=False))
    for start in range(0, len(files), cache.CHUNK):
        yield from files[start : start + cache.CHUNK][image]


def _decode(file: dict[str, Any] | None, shape: Shape, policy: Policy) -> np.ndarray | str:
    if file is None or (file["bytes"] is None and file["path"] is None):
        return "there is none"
    source = Path(file["path"]) if file["bytes"] is None else file["bytes"]
    try:
        return base.decoded(source, shape, policy)
    except base.OtherSize as error:
        raise UserError(f"data.resize: exact, but {error}, or set data.resize: crop") from None

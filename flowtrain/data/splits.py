"""The splits of a data set, its labels, and the fingerprint of its content."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.config import Data as DataConfig
from flowtrain.datasets import base
from flowtrain.datasets.base import Images, Pixels
from flowtrain.errors import UserError
from flowtrain.flow.inputs import quantize
from flowtrain.flow.kinds import kind_of

SplitName = Literal["train", "validation", "test", "all"]


def sampled(count: int, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` of the positions 0..count-1, sorted: a sample without replacement, as data are
    often sorted by class. A larger sample contains the smaller one.
    """
    return np.sort(base.frozen_random(seed, count).permutation(count)[:most])


@dataclass(frozen=True)
class Split:
    """Some images of an array: `pixels[indices]`."""

    pixels: Pixels  # uint8 (N, C, H, W), or float32 for points; they may be mapped files
    indices: np.ndarray
    reduced_to: int | None = None  # levels, from 256; None: values as stored
    # read labels, int64 (N,), and file names of the whole array; None if there are none
    read_labels: Callable[[], np.ndarray] | None = None
    read_names: Callable[[], list[str]] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def bytes_of_image(self) -> int:
        return base.bytes_of_image(self.pixels)

    @property
    def mapped(self) -> bool:
        """Whether the images are in mapped files, which all processes share."""
        return isinstance(self.pixels, np.memmap) or not isinstance(self.pixels, np.ndarray)

    def take(self, positions: np.ndarray | slice) -> Tensor:
        """The images at some positions of this split, `(B, C, H, W)` on the CPU. They are uint8 in
        0..Q-1, or float32 for points.
        """
        pixels = np.ascontiguousarray(self.pixels[self.indices[positions]])
        return torch.from_numpy(quantize(pixels, self.reduced_to) if self.reduced_to else pixels)

    def at(self, positions: np.ndarray) -> "Split":
        return dataclasses.replace(self, indices=self.indices[positions])

    def sample(self, most: int, seed: int = 0) -> "Split":
        """At most `most` of the images: those at the positions of `sampled`."""
        return self.at(sampled(len(self), most, seed))

    @cached_property
    def labels(self) -> Tensor | None:
        """The classes of all images of this split, int64 `(N,)` on the CPU, or None."""
        labels = self.read_labels
        return None if labels is None else torch.from_numpy(labels()[self.indices])

    @property
    def names(self) -> list[str] | None:
        """The file names of all images of this split, or None."""
        if self.read_names is None:
            return None
        names = self.read_names()
        return [names[index] for index in self.indices]


class DataSet:
    """The images that a configuration names. Nothing is read or downloaded before `split`.

    `undivided` are all images, whose only split is `all`. Images with 256 levels are reduced to
    2**`data.n_bits` levels, or else to `levels`. Raises `UserError` if options do not fit together.
    """

    def __init__(
        self, config: DataConfig, undivided: Images | None = None, levels: int | None = None
    ):
        self.config = config
        self.undivided = undivided is not None
        if undivided is not None:
            self.train_images = self.test_images = undivided
        else:
            build = configuration.component(DataConfig, config.name).build
            options = {"seed": config.split_seed, **config.options()}
            self.train_images = build(config.root, "train", **options)
            self.test_images = build(config.root, "test", **options)
        for images in (self.train_images, self.test_images):
            if not isinstance(images, Images):
                raise UserError(
                    f"data.name: `build` of {config.name} returned a {type(images).__name__}, "
                    f"expected Images"
                )
        self.shape = self.train_images.shape
        if self.test_images.shape != self.shape:
            raise UserError(
                f"data: test images have shape {self.test_images.shape}, training images "
                f"{self.shape}"
            )
        kind = kind_of(self.train_images.num_bins)
        if kind.num_bins is not None and self.shape[0] not in (1, 3):
            raise UserError(f"data: it has {self.shape[0]} channels, and images have 1 or 3")
        if config.n_bits < 8 and self.train_images.num_bins != 256:
            raise UserError(f"data.n_bits: {config.name} has {kind.words}; only 256 can be reduced")
        levels = 2**config.n_bits if config.n_bits < 8 else levels
        self.reduced_to = levels if kind.num_bins == 256 and levels != 256 else None
        self.kind = kind_of(self.reduced_to) if self.reduced_to else kind
        if config.flip or config.shift:
            kind.require_bins(
                f"data.{'flip' if config.flip else 'shift'}: {config.name} has no images to augment"
            )
        if min(self.shape[1:]) <= config.shift:
            raise UserError(
                f"data.shift: {config.shift} is not smaller than the images ({self.shape})"
            )

    def require(self, shape: tuple[int, ...], num_bins: int | None, model: Path) -> None:
        """Raises `UserError` unless the images have the shape and levels of a model. `model` is the
        path of its checkpoint, for the message.
        """
        if (self.shape, self.num_bins) != (shape, num_bins):
            raise UserError(
                f"data of shape {self.shape} with {self.kind.words} cannot be evaluated by "
                f"{model}, a model of shape {shape} with {kind_of(num_bins).words}"
            )

    @property
    def num_bins(self) -> int | None:
        """Q of the images as they are used; None for real values."""
        return self.kind.num_bins

    @property
    def flip(self) -> bool:
        return self.train_images.flip if self.config.flip is None else self.config.flip

    @cached_property
    def _training(self) -> "_Part":
        return _read(self.train_images, f"{self.config.name}, training images")

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        first = self._training.first
        try:
            return base.hold_out(first, self.config.validation, self.config.split_seed)
        except UserError as error:
            raise UserError(f"data.validation: {error}") from error

    def split(self, name: SplitName) -> Split:
        """The images of one split, which are read, and downloaded on first use."""
        if name in ("test", "all"):
            part = _read(self.test_images, f"{self.config.name}, {name} images")
            indices = part.rows
        else:
            part = self._training
            kept, held = self._held_out
            indices = part.rows[kept if name == "train" else held]
        images = part.images
        return Split(part.pixels, indices, self.reduced_to, images.labels, images.names)

    def equal_to_training(self, split: Split) -> int | None:
        """How many images of a split are equal to a training image, as stored, with all bits. None
        if the training images would first have to be downloaded or decoded.
        """
        if self.undivided or not self.train_images.at_hand():
            return None
        part = self._training
        known = {digest.tobytes() for digest in part.digests[self._held_out[0]]}
        found = base.digests(split.pixels, split.indices)
        return sum(digest.tobytes() in known for digest in found)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies the training and validation images: their number, content and division."""
        kept, held = self._held_out
        part = self._training
        equal = base.duplicates(part.first)
        edition = self.train_images.edition
        also = ({"duplicates": equal} if equal else {}) | ({"edition": edition} if edition else {})
        return {
            "shape": list(self.shape),
            "levels": self.num_bins,
            "train": len(kept),
            "validation": len(held),
            "split_seed": self.config.split_seed,
            "content": self.train_images.key or part.content,
        } | also

    def matches(self, known: dict[str, Any]) -> bool:
        """Whether a checkpoint's fingerprint is of these images and, with classes, these labels."""
        here = self.fingerprint
        if "labels" in known:
            labels = self.split("train").labels
            here = here | ({} if labels is None else {"labels": fingerprint_of(labels)})
        return known.items() <= here.items()


def fingerprint_of(labels: Tensor) -> str:
    return hashlib.sha256(labels.numpy().data).hexdigest()


@dataclass(frozen=True)
class _Part:
    """A part of a data set: an array, and its rows that belong to the part."""

    images: Images
    pixels: Pixels
    rows: np.ndarray

    @property
    def content(self) -> str:
        """A digest of all images, from the digests of single images if known."""
        if self.images.digests is not None:
            return hashlib.sha256(self.digests.tobytes()).hexdigest()
        return base.content(self.pixels, self.rows)

    @cached_property
    def digests(self) -> np.ndarray:
        known = self.images.digests
        return base.digests(self.pixels, self.rows) if known is None else known()[self.rows]

    @cached_property
    def first(self) -> np.ndarray:
        return base.first_equal(self.digests)


def _read(images: Images, what: str) -> _Part:
    pixels = images.read()
    rows = np.arange(len(pixels)) if images.rows is None else images.rows()
    if pixels.shape[1:] != images.shape or len(rows) == 0:
        raise UserError(
            f"data: {what}: {len(rows)} images of shape {pixels.shape[1:]}, expected {images.shape}"
        )
    fault = kind_of(images.num_bins).fault(pixels) if isinstance(pixels, np.ndarray) else None
    if fault:  # mapped files are bytes with 256 levels
        raise UserError(f"data: {what}: {fault}")
    return _Part(images, pixels, rows)


def labels_for(classes: int, labels: Tensor | None, name: str) -> Tensor:
    """The labels of images for a model with so many classes, int64 `(N,)`. Raises `UserError` if
    there are none, or if one is outside 0..classes-1.
    """
    if labels is None:
        raise UserError(f"model.classes: {classes}, but {name} has no labels")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise UserError(
            f"model.classes: {classes}, but {name} has the labels "
            f"{int(labels.min())}..{int(labels.max())}"
        )
    return labels

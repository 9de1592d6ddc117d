"""From a data set to batches: the splits, the fingerprint, the seeded order and augmentation."""

import collections
import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.config import Config
from flowtrain.config import Data as DataConfig
from flowtrain.datasets.base import Images, hold_out
from flowtrain.errors import UserError
from flowtrain.system import distributed
from flowtrain.system.device import send
from flowtrain.system.random import Stream, generator

INITIALIZATION_IMAGES = 64  # at least, where there are as many: fewer say little of the coarsest level

SplitName = Literal["train", "validation", "test", "all"]


@dataclass(frozen=True)
class Split:
    """Some images of an array: `pixels[indices]`, reduced by `drop_bits`."""

    pixels: np.ndarray  # uint8 (N, C, H, W), perhaps a memory map; float32 for real-valued data
    indices: np.ndarray
    drop_bits: int
    read_labels: Callable[[], np.ndarray] | None = None  # of all of the array, int64 (N,); None: there are none

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, positions: np.ndarray | slice) -> Tensor:
        """The images at some positions of this split, `(B, C, H, W)` on the CPU: uint8, 0..Q-1, or float32."""
        pixels = np.ascontiguousarray(self.pixels[self.indices[positions]])
        return torch.from_numpy(pixels >> self.drop_bits if self.drop_bits else pixels)

    @cached_property
    def labels(self) -> Tensor | None:
        """The classes of all images of this split, int64 `(N,)` on the CPU; None where there are none."""
        return None if self.read_labels is None else torch.from_numpy(self.read_labels()[self.indices])


class DataSet:
    """The images that a configuration names. Nothing is read or downloaded before a split is asked for.

    Where they have no division of their own, `undivided` gives all of them, and `all` is the only split to ask for.
    Raises `UserError` where the options do not fit together.
    """

    def __init__(self, config: DataConfig, undivided: Images | None = None):
        self.config = config
        self.undivided = undivided is not None
        if undivided is not None:
            self.train_images = self.test_images = undivided
        else:
            module = configuration.component_module("datasets", config.name)
            options = config.options()
            self.train_images = module.build(Path(config.root), "train", seed=config.split_seed, **options)
            self.test_images = module.build(Path(config.root), "test", seed=config.split_seed, **options)
        self.shape = self.train_images.shape
        if self.test_images.shape != self.shape:
            raise UserError(f"data: test images have shape {self.test_images.shape}, training images {self.shape}")
        if config.n_bits < 8 and self.train_images.levels != 256:
            raise UserError(
                f"data.n_bits: {config.name} has {levels_in_words(self.train_images.levels)}; only 256 can be reduced"
            )
        self.drop_bits = 8 - config.n_bits
        levels = self.train_images.levels
        self.levels = None if levels is None else levels >> self.drop_bits
        if levels is None and (config.flip or config.shift):
            raise UserError(f"data.{'flip' if config.flip else 'shift'}: {config.name} has no images to augment")
        if min(self.shape[1:]) <= config.shift:
            raise UserError(f"data.shift: {config.shift} is not smaller than the images ({self.shape})")

    def require(self, shape: tuple[int, ...], levels: int | None, model: Path) -> None:
        """Raises `UserError` unless the images are of this shape and number of levels, those of `model`."""
        if (self.shape, self.levels) != (shape, levels):
            raise UserError(
                f"data of shape {self.shape} with {levels_in_words(self.levels)} cannot be evaluated by {model}, "
                f"a model of shape {shape} with {levels_in_words(levels)}"
            )

    @property
    def flip(self) -> bool:
        return self.train_images.flip if self.config.flip is None else self.config.flip

    @cached_property
    def _training_pixels(self) -> np.ndarray:
        return _checked(self.train_images, f"{self.config.name}, training images")

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._training_pixels)
        try:
            return hold_out(count, self.config.validation, self.config.split_seed)
        except UserError as error:
            raise UserError(f"data.validation: {error}") from error

    def split(self, name: SplitName) -> Split:
        """The images of one split. Reads them, and downloads them on first use."""
        if name in ("test", "all"):
            pixels = _checked(self.test_images, f"{self.config.name}, {name} images")
            return Split(pixels, np.arange(len(pixels)), self.drop_bits, self.test_images.labels)
        kept, held = self._held_out
        indices = kept if name == "train" else held
        return Split(self._training_pixels, indices, self.drop_bits, self.train_images.labels)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the training and validation images are: their number, their content, and how they were split."""
        kept, held = self._held_out
        content = self.train_images.key or hashlib.sha256(np.ascontiguousarray(self._training_pixels).data).hexdigest()
        return {
            "shape": list(self.shape),
            "levels": self.levels,
            "train": len(kept),
            "validation": len(held),
            "split_seed": self.config.split_seed,
            "content": content,
        }


def levels_in_words(levels: int | None) -> str:
    return "real values" if levels is None else f"{levels} levels"


def _checked(images: Images, what: str) -> np.ndarray:
    pixels = images.read()
    if pixels.shape[1:] != images.shape or len(pixels) == 0:
        raise UserError(f"data: {what}: {len(pixels)} images of shape {pixels.shape[1:]}, expected {images.shape}")
    if images.levels is None:
        if not np.isfinite(pixels).all():
            raise UserError(f"data: {what}: a value that is not finite")
    elif images.levels < 256 and int(pixels.max()) >= images.levels:
        raise UserError(f"data: {what}: a value of {int(pixels.max())}, expected 0..{images.levels - 1}")
    return pixels


def labels_of(split: Split, classes: int, name: str) -> Tensor:
    """The labels for a model of so many classes, int64 `(N,)`. Raises `UserError` where there are none, or others."""
    labels = split.labels
    if labels is None:
        raise UserError(f"model.classes: {classes}, but {name} has no labels")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise UserError(f"model.classes: {classes}, but {name} has the labels {int(labels.min())}..{int(labels.max())}")
    return labels


# --- training batches -------------------------------------------------------------------------------------------------


class Batches:
    """The batches of a training run, on the training device.

    The order is one seeded permutation of the split after the other. A step takes the next images of it, which may span
    two permutations: `batch_size` for each process, in the order of their ranks. A split that fits is one tensor on the
    device; a larger one is read by threads.
    """

    def __init__(self, data: DataSet, config: Config, batch_size: int, device: torch.device):
        self.source = data.split("train")
        self.batch_size = batch_size
        self.all_processes = batch_size * distributed.world()  # images of a step
        self.seed = config.seed
        self.device = device
        self.flip, self.shift = data.flip, config.data.shift
        self.workers = config.data.workers
        nbytes = len(self.source) * self.source.pixels[0].nbytes
        self.streams = nbytes > config.data.max_in_memory * 2**30
        self.resident = None if self.streams else self.source.take(slice(None)).to(device)
        self.labels = labels_of(self.source, config.model.classes, data.config.name) if config.model.classes else None
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def positions(self, images: int) -> np.ndarray:
        """Which images of the split this process takes in a step, after `images` of the order are used up."""
        return self._order(images + distributed.rank() * self.batch_size, self.batch_size)

    def _order(self, start: int, count: int) -> np.ndarray:
        wanted = np.arange(start, start + count)
        epochs, offsets = np.divmod(wanted, len(self.source))
        parts = [self._permutation(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        known, order = self._epoch  # at once: other threads put theirs there
        if known != epoch:
            order = torch.randperm(len(self.source), generator=generator(self.seed, Stream.ORDER, int(epoch))).numpy()
            self._epoch = (epoch, order)
        return order

    def starting_at(self, step: int, images: int | None = None) -> Iterator[Tensor]:
        """This process's batches from `step` on, without end: uint8 `(B, C, H, W)` on the device, augmented.

        Before it `images` were used up; by default those of as many steps like these.
        """
        return (x for x, _ in self.labelled_from(step, images))

    def labelled_from(self, step: int, images: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same batches with their classes, int64 `(B,)`, where the configuration's model wants them."""
        images = step * self.all_processes if images is None else images
        starts = itertools.count(images, self.all_processes)
        for x in _ahead(self._read, starts, self.workers) if self.streams else map(self._gather, starts):
            labels = None if self.labels is None else send(self.labels[self.positions(images)], self.device)
            x = self._augment(x.to(self.device, non_blocking=True), step, distributed.rank() * self.batch_size)
            yield x, labels
            step += 1
            images += self.all_processes

    def first_of_all(self) -> Tensor:
        """The images that layers set themselves from: the first of the order, of all processes, or some more."""
        count = max(self.all_processes, min(INITIALIZATION_IMAGES, len(self.source)))
        x = self.source.take(self._order(0, count)).to(self.device)
        return augment(x, self.flip, self.shift, generator(self.seed, Stream.AUGMENTATION, 0))

    def _augment(self, x: Tensor, step: int, start: int) -> Tensor:
        randomness = generator(self.seed, Stream.AUGMENTATION, step)
        return augment(x, self.flip, self.shift, randomness, start, self.all_processes)

    def _gather(self, images: int) -> Tensor:
        """A batch out of the tensor on the device."""
        assert self.resident is not None
        return self.resident[send(torch.from_numpy(self.positions(images)), self.device)]

    def _read(self, images: int) -> Tensor:
        """A batch, ready to go to the device."""
        x = self.source.take(self.positions(images))
        return x.pin_memory() if self.device.type == "cuda" else x


def _ahead(function: Callable[[int], Tensor], arguments: Iterator[int], threads: int) -> Iterator[Tensor]:
    """The function's results in order, computed by threads before they are asked for.

    Threads do: what takes time is the disk, and copies, for neither of which Python's lock is held. The function is not
    to compute with torch on large tensors, which would start as many more threads as training itself uses.
    """
    if threads == 0:
        yield from map(function, arguments)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    try:
        waiting = collections.deque(pool.submit(function, next(arguments)) for _ in range(2 * threads))
        while True:
            x = waiting.popleft().result()
            waiting.append(pool.submit(function, next(arguments)))
            yield x
    finally:
        pool.shutdown(cancel_futures=True)


def augment(
    x: Tensor, flip: bool, shift: int, randomness: torch.Generator, start: int = 0, whole: int | None = None
) -> Tensor:
    """Mirrors each image with probability 1/2, and moves it by up to `shift` pixels, its edge repeated.

    `x` are the images from `start` on of a batch of `whole`: what happens to an image does not depend on the parts that
    a batch is cut into.
    """
    batch, _, height, width = x.shape
    whole = batch if whole is None else whole
    if flip:
        mirrored = send(torch.rand(whole, generator=randomness)[start : start + batch] < 0.5, x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if shift:
        moves = torch.randint(-shift, shift + 1, (2, whole, 1), generator=randomness)
        moves = send(moves[:, start : start + batch], x.device)
        rows = (torch.arange(height, device=x.device) + moves[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + moves[1]).clamp(0, width - 1)
        images = torch.arange(batch, device=x.device)[:, None, None]
        x = x.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    return x

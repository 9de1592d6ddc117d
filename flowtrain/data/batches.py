"""Training batches: the seeded order, augmentation, and reading ahead of the device."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flowtrain.config import Config
from flowtrain.data.splits import DataSet, labels_of
from flowtrain.system import distributed
from flowtrain.system.device import send
from flowtrain.system.random import Stream, generator

# at least, where there are as many: fewer say little of the coarsest level
INITIALIZATION_IMAGES = 64


class Batches:
    """The batches of a training run, on the training device.

    The order is one seeded permutation of the split after the other. A step takes the next images
    of it, which may span
    two permutations: `batch_size` for each process, in the order of their ranks. A split that fits
    is one tensor on the device; a larger one is read by threads.
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
        self.labels = (
            labels_of(self.source, config.model.classes, data.config.name)
            if config.model.classes
            else None
        )
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def positions(self, images: int) -> np.ndarray:
        """Which images of the split this process takes in a step, after `images` of the order are
        used up.
        """
        return self._order(images + distributed.rank() * self.batch_size, self.batch_size)

    def _order(self, start: int, count: int) -> np.ndarray:
        wanted = np.arange(start, start + count)
        epochs, offsets = np.divmod(wanted, len(self.source))
        parts = [self._permutation(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        known, order = self._epoch  # at once: other threads put theirs there
        if known != epoch:
            order = torch.randperm(
                len(self.source), generator=generator(self.seed, Stream.ORDER, int(epoch))
            ).numpy()
            self._epoch = (epoch, order)
        return order

    def starting_at(self, step: int, images: int | None = None) -> Iterator[Tensor]:
        """This process's batches from `step` on, without end: uint8 `(B, C, H, W)` on the device,
        augmented.

        Before it `images` were used up; by default those of as many steps like these.
        """
        return (x for x, _ in self.labelled_from(step, images))

    def labelled_from(
        self, step: int, images: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same batches with their classes, int64 `(B,)`, where the configuration's model wants
        them.
        """
        images = step * self.all_processes if images is None else images
        starts = itertools.count(images, self.all_processes)
        for x in (
            _ahead(self._read, starts, self.workers) if self.streams else map(self._gather, starts)
        ):
            labels = (
                None
                if self.labels is None
                else send(self.labels[self.positions(images)], self.device)
            )
            x = self._augment(
                x.to(self.device, non_blocking=True), step, distributed.rank() * self.batch_size
            )
            yield x, labels
            step += 1
            images += self.all_processes

    def first_of_all(self) -> Tensor:
        """The images that layers set themselves from: the first of the order, of all processes, or
        some more.
        """
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


def _ahead(
    function: Callable[[int], Tensor], arguments: Iterator[int], threads: int
) -> Iterator[Tensor]:
    """The function's results in order, computed by threads before they are asked for.

    Threads do: what takes time is the disk, and copies, for neither of which Python's lock is held.
    The function is not to compute with torch on large tensors, which would start as many more
    threads as training itself uses.
    """
    if threads == 0:
        yield from map(function, arguments)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    try:
        waiting = collections.deque(
            pool.submit(function, next(arguments)) for _ in range(2 * threads)
        )
        while True:
            x = waiting.popleft().result()
            waiting.append(pool.submit(function, next(arguments)))
            yield x
    finally:
        pool.shutdown(cancel_futures=True)


def augment(
    x: Tensor,
    flip: bool,
    shift: int,
    randomness: torch.Generator,
    start: int = 0,
    whole: int | None = None,
) -> Tensor:
    """Mirrors each image with probability 1/2, and moves it by up to `shift` pixels, its edge
    repeated.

    `x` are the images from `start` on of a batch of `whole`: what happens to an image does not
    depend on the parts that a batch is cut into.
    """
    batch, _, height, width = x.shape
    whole = batch if whole is None else whole
    if flip:
        mirrored = send(
            torch.rand(whole, generator=randomness)[start : start + batch] < 0.5, x.device
        )
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if shift:
        moves = torch.randint(-shift, shift + 1, (2, whole, 1), generator=randomness)
        moves = send(moves[:, start : start + batch], x.device)
        rows = (torch.arange(height, device=x.device) + moves[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + moves[1]).clamp(0, width - 1)
        images = torch.arange(batch, device=x.device)[:, None, None]
        x = (
            x.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]]
            .movedim(-1, 1)
            .contiguous()
        )
    return x

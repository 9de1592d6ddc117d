"""Training batches: the seeded order, augmentation, and reading ahead of the device."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flowtrain.config import Config
from flowtrain.data.splits import DataSet, labels_for
from flowtrain.system import capacity, distributed
from flowtrain.system.device import send
from flowtrain.system.random import Stream, generator, uniform

# The largest number of images for initialization: the whole pass has to fit into memory, unlike a
# step that `train.accumulate` divides.
MOST_INITIALIZATION_IMAGES = 1024


class Batches:
    """The batches of a training run, on the training device, as a function of the images used.

    The order is one seeded permutation of the split after another. A step takes the next images of
    this order, `batch_size` for each process, by rank. A split that fits into `data.max_in_memory`
    is one tensor on the device. `data.workers` threads read a larger one ahead. `close` ends them.
    On a CPU, they read mapped files of any size, because a copy would take memory for each process.
    """

    def __init__(self, data: DataSet, config: Config, batch_size: int, device: torch.device):
        self.source = data.split("train")
        self.batch_size = batch_size
        self.all_processes = batch_size * distributed.world()  # images per step
        self.seed = config.seed
        self.device = device
        self.flip, self.shift = data.flip, config.data.shift
        nbytes = len(self.source) * self.source.bytes_of_image
        large = nbytes > config.data.max_in_memory * 2**30
        self.streams = large or (self.source.mapped and device.type == "cpu")
        if self.streams:
            ahead = ReadAhead.batches(config.data.workers)
            capacity.require(
                ahead * batch_size * self.source.bytes_of_image,
                f"data.workers: {config.data.workers} threads hold {ahead:,} batches of "
                f"{batch_size:,} images, which take",
            )
        else:
            capacity.require(
                nbytes,
                f"data.max_in_memory: {config.data.max_in_memory:g}, and the {len(self.source):,} "
                f"images to train on take",
                device,
            )
        self.resident = None if self.streams else self.source.take(slice(None)).to(device)
        classes, name = config.model.classes, data.config.name
        self.labels = labels_for(classes, self.source.labels, name) if classes else None
        self._reader = ReadAhead(self._read, self.all_processes, config.data.workers)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def at(self, images: int) -> tuple[Tensor, Tensor | None]:
        """This process's augmented images of the step after `images` of the order are used, uint8
        or float32 `(B, C, H, W)`. Their classes, int64 `(B,)`, come with them if the model is
        class-conditional.
        """
        if self.resident is None:
            x = self._reader(images).to(self.device, non_blocking=True)
        else:
            x = self.resident[send(torch.from_numpy(self.positions(images)), self.device)]
        labels = None
        if self.labels is not None:
            labels = send(self.labels[self.positions(images)], self.device)
        first = images + distributed.rank() * self.batch_size
        return augment(x, self.flip, self.shift, self.seed, first), labels

    def first_of_all(self, at_least: int) -> Tensor:
        """The images for data-dependent initialization: the first of the order, for all processes.
        There are at least `at_least`, if the split has so many, and at most
        `MOST_INITIALIZATION_IMAGES`.
        """
        count = max(self.all_processes, min(at_least, len(self.source)))
        count = min(count, MOST_INITIALIZATION_IMAGES)
        x = self.source.take(self._order(0, count)).to(self.device)
        return augment(x, self.flip, self.shift, self.seed)

    def positions(self, images: int) -> np.ndarray:
        """Which images of the split this process takes after `images` of the order are used."""
        return self._order(images + distributed.rank() * self.batch_size, self.batch_size)

    def close(self) -> None:
        self._reader.close()

    def _order(self, start: int, count: int) -> np.ndarray:
        wanted = np.arange(start, start + count)
        epochs, offsets = np.divmod(wanted, len(self.source))
        parts = [self._permutation(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        known, order = self._epoch  # read at once, because other threads replace it
        if known != epoch:
            order = torch.randperm(
                len(self.source), generator=generator(self.seed, Stream.ORDER, int(epoch))
            ).numpy()
            self._epoch = (epoch, order)
        return order

    def _read(self, images: int) -> Tensor:
        """A batch, ready to go to the device."""
        x = self.source.take(self.positions(images))
        return x.pin_memory() if self.device.type == "cuda" else x


class ReadAhead:
    """A function of a position, which threads compute in advance for the positions that follow.

    Positions are `stride` apart. Any other position is right too, but not ready. With 0 threads,
    nothing is read ahead. Threads are enough, because reading and copying release Python's lock.
    The function must not compute with torch on large tensors, which would start further threads.
    """

    def __init__(self, function: Callable[[int], Tensor], stride: int, threads: int):
        self.function = function
        self.stride = stride
        self.threads = threads
        self.pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="data")
        self.results: dict[int, Future[Tensor]] = {}

    @staticmethod
    def batches(threads: int) -> int:
        """The number of results at a time, with the one in use."""
        return 2 * threads + 1

    def __call__(self, position: int) -> Tensor:
        if not self.threads:
            return self.function(position)
        wanted = range(position, position + self.batches(self.threads) * self.stride, self.stride)
        for other in self.results.keys() - set(wanted):
            self.results.pop(other).cancel()
        for each in wanted:
            if each not in self.results:
                self.results[each] = self.pool.submit(self.function, each)
        return self.results.pop(position).result()

    def close(self) -> None:
        """Ends the threads, and drops the work that they have not begun."""
        self.pool.shutdown(cancel_futures=True)


def augment(x: Tensor, flip: bool, shift: int, seed: int, first: int = 0) -> Tensor:
    """Mirrors each image with probability 1/2, and moves it by up to `shift` pixels, repeating the
    edges. `x` starts at position `first` in the order of a run. An image's augmentation depends on
    the seed and its position alone.
    """
    batch, _, height, width = x.shape
    if not (flip or shift):
        return x
    draws = uniform((batch, 3), seed, Stream.AUGMENTATION, first)  # on the host: there are few
    if flip:
        mirrored = send(draws[:, 0] < 0.5, x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if shift:
        moves = (draws[:, 1:].double() * (2 * shift + 1)).long() - shift
        moves = send(moves.T.unsqueeze(-1), x.device)  # (2, B, 1)
        rows = (torch.arange(height, device=x.device) + moves[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + moves[1]).clamp(0, width - 1)
        images = torch.arange(batch, device=x.device)[:, None, None]
        x = x.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]]
        x = x.movedim(-1, 1).contiguous()
    return x

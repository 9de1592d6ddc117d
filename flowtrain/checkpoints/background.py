"""Checkpoints that a thread hashes and writes during training, from a copy in the host's memory.

torch's `distributed.checkpoint.async_save` does the same for a folder with a pickle. Here it is one
file, with a checksum, that replaces the old one.
"""

import concurrent.futures
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flowtrain.system import capacity
from flowtrain.system.console import console

THREAD = "checkpoint"  # how the thread's name begins
ALIGNED = 64  # bytes

Write = Callable[[Mapping[str, Tensor]], None]


class Background:
    """Calls functions that write tensors in one thread, one after the other, with a copy of the
    tensors. The copy's memory is kept for the next one.
    """

    def __init__(self) -> None:
        self._copy: dict[str, Tensor] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, THREAD)
        self._running: concurrent.futures.Future[None] | None = None
        self._said = False

    def start(self, tensors: Mapping[str, Tensor], write: Write) -> None:
        """Returns when the tensors may change, because they are copied, or about to be by the
        device. It first waits for an earlier write, and raises its error. If memory is short, it
        returns when the tensors are written.
        """
        self.finish()
        if not self._make_room(tensors):
            write(tensors)
            return
        for name, tensor in tensors.items():
            self._copy[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        copied = torch.cuda.Event() if _on_gpu(tensors) else None
        if copied is not None:
            copied.record()

        def run() -> None:
            if copied is not None:
                copied.synchronize()
            write(self._copy)

        self._running = self._thread.submit(run)

    def raise_error(self) -> None:
        """Raises the error of the last write, if it has failed already. It does not wait."""
        if self._running is not None and self._running.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the last write. Raises its error, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def wait(self) -> None:
        """Waits for the last write, but raises nothing, because another error is on its way."""
        if self._running is not None:
            concurrent.futures.wait([self._running])

    def _make_room(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether there is memory for a copy."""
        if _layout(tensors) == _layout(self._copy):
            return True
        self._copy = {}
        free = capacity.left(torch.device("cpu"))
        needed = memory_of_copy(tensors, free)
        if not needed:
            if not self._said:
                console.print(
                    f"training waits while a checkpoint is written: {free / 2**30:,.2f} GiB of "
                    f"memory are left, too few for a copy"
                )
            self._said = True
            return False
        room = torch.empty(needed, dtype=torch.uint8, pin_memory=_on_gpu(tensors))
        start = 0
        for name, tensor in tensors.items():
            part = room[start : start + tensor.nbytes]
            self._copy[name] = part.view(tensor.dtype).view(tensor.shape)
            start += _aligned(tensor.nbytes)
        return True


def memory_of_copy(tensors: Mapping[str, Tensor], free: int) -> int:
    """Bytes of a copy in the host's memory, or 0 if that is more than half of `free` bytes."""
    size = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
    if _on_gpu(tensors):
        size = 1 << (size - 1).bit_length()  # torch takes pinned memory by powers of two
    return size if 2 * size <= free else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


def _layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]

"""Signals that end a run, and the clock that measures it."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from flowtrain.system import distributed
from flowtrain.training.state import State

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The signal that asked for the end, 0 before: `asked` this process, `signum` all of them."""

    asked: int = 0
    signum: int = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        first = not self.asked
        self.asked = signum
        if distributed.world() == 1:  # nobody to agree with
            self.signum = signum
        # torchrun hands on to every process what it gets, and Ctrl-C reaches them anyway.
        if not distributed.is_main() or (distributed.world() > 1 and not first):
            return
        # Not through rich, which may be in the middle of printing, or of an import.
        with contextlib.suppress(OSError):  # nobody reads
            os.write(1, f"{signal.Signals(signum).name}: finishing the step and saving\n".encode())


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    stop = Stop()
    before = {signum: signal.signal(signum, stop) for signum in STOPPING}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Clock:
    """Adds the wall-clock time to the progress, and measures the speed of training alone."""

    def __init__(self, state: State):
        self.state = state
        self.last = time.perf_counter()
        self.window_images = 0
        self.window_seconds = 0.0

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        self.state.progress.seconds += elapsed
        return elapsed

    def tick(self, images: int = 0) -> None:
        """A part of a step is done, the last one with its number of images."""
        self.window_seconds += self._elapsed()
        self.window_images += images

    def skip(self) -> None:
        """Something else is done: validation, a grid. It counts as time of the run, not of
        training.
        """
        self._elapsed()

    def images_per_second(self) -> float:
        speed = self.window_images / max(self.window_seconds, 1e-9)
        self.window_images, self.window_seconds = 0, 0.0
        return speed

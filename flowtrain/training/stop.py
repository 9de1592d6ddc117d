"""Signals that end a run, and the clock of a run."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from flowtrain.system import distributed
from flowtrain.training.state import State

# Windows has no SIGHUP.
STOPPING = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Stop:
    """The signal that ends a run, or 0."""

    asked: int = 0  # of this process
    signum: int = 0  # that all processes have agreed on

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        first = not self.asked
        self.asked = signum
        if distributed.world() == 1:  # there is nobody to agree with
            self.signum = signum
        # torchrun and Ctrl-C send a signal to every process. So only process 0 prints, once.
        if not distributed.is_main() or (distributed.world() > 1 and not first):
            return
        # Not with rich: the signal may have interrupted its printing, or an import.
        with contextlib.suppress(OSError):  # standard output is closed
            os.write(1, f"{signal.Signals(signum).name}: finishing the step and saving\n".encode())


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Catches SIGINT, SIGTERM and SIGHUP, and puts the earlier handlers back at the end."""
    stop = Stop()
    before = {
        signum: signal.signal(signum, stop)
        for signum in STOPPING
        # nohup ignores it, so that the run outlives the terminal
        if signum.name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Clock:
    """Adds the time of `train.clock` to the progress, and measures the speed of training.

    The speed does not count validation, samples and checkpoints, nor does processor time.
    """

    def __init__(self, state: State):
        self.state = state
        self.wall = state.config.train.clock == "wall"
        self.now = time.perf_counter if self.wall else time.process_time
        self.last = self.now()
        self.window_images = 0
        self.window_seconds = 0.0
        # Where this part of the run began. An earlier part may have had another speed.
        self.first_step, self.first_seconds = state.progress.step, state.progress.seconds

    def tick(self, images: int = 0) -> None:
        """Call it after each part of a step, after the last part with its images."""
        elapsed = self._elapsed()
        self.state.progress.seconds += elapsed
        self.window_seconds += elapsed
        self.window_images += images

    def skip(self) -> None:
        """Call it after anything else, such as validation. It counts as wall-clock time."""
        elapsed = self._elapsed()
        if self.wall:
            self.state.progress.seconds += elapsed

    def _elapsed(self) -> float:
        now = self.now()
        elapsed, self.last = now - self.last, now
        return elapsed

    def images_per_second(self, begin_anew: bool) -> float:
        """The speed since the last call with `begin_anew`."""
        speed = self.window_images / max(self.window_seconds, 1e-9)
        if begin_anew:
            self.window_images, self.window_seconds = 0, 0.0
        return speed

    def seconds_left(self) -> float:
        """The time to the end of the run, at the speed of this part of it."""
        train, progress = self.state.config.train, self.state.progress
        if train.budget is not None:
            return train.budget - progress.seconds
        assert train.num_steps is not None
        steps = max(1, progress.step - self.first_step)
        return (progress.seconds - self.first_seconds) / steps * (train.num_steps - progress.step)

"""Loss, gradient norm, clock and signals of the steps, read one step late."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtrain.checkpoints.description import Progress
from flowtrain.system import distributed
from flowtrain.training.state import State
from flowtrain.training.stop import STOPPING, Clock, Stop


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step, of the whole batch and the same on every process."""

    step: int  # before it
    images: int  # used before it
    rate: float
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss + self.grad_norm)


class DelayedMetrics:
    """Copies the numbers of each step, summed over processes, in the background. So the device has
    its next step before the host waits for this one.

    All processes receive the same loss, norm, signal, and clock, which is process 0's.
    """

    def __init__(self, state: State, clock: Clock, stop: Stop):
        self.state = state
        self.clock = clock
        self.stop = stop
        self.seconds = state.progress.seconds  # the same on every process
        self.last: StepMetrics | None = None
        self.failed: StepMetrics | None = None  # not finite: nothing has changed since
        # Progress before the step, learning rate, and a function that waits for the sums.
        self._sent: deque[tuple[Progress, float, Callable[[], list[float]]]] = deque()

    def send(self, loss: Tensor, grad_norm: Tensor, rate: float) -> None:
        """`loss` and `grad_norm` are 0-dimensional, and of this process."""
        self.clock.tick()
        progress = self.state.progress
        seconds = progress.seconds if distributed.is_main() else 0.0
        asked = [float(self.stop.asked == signum) for signum in STOPPING]
        sums = distributed.total_later(torch.stack([loss, grad_norm]), [seconds, *asked])
        self._sent.append((dataclasses.replace(progress), rate, sums))

    def receive(self, leaving: int) -> None:
        """Waits for the numbers of all steps but the `leaving` last ones, and of all steps after a
        non-finite one: they have changed nothing, and do not count.
        """
        while len(self._sent) > (leaving if self.failed is None else 0):
            before, rate, sums = self._sent.popleft()
            loss, grad_norm, seconds, *asked = sums()
            loss, grad_norm = loss / distributed.world(), grad_norm / distributed.world()
            self.last = StepMetrics(before.step, before.images, rate, loss, grad_norm)
            self.seconds = seconds
            progress = self.state.progress
            progress.seconds += seconds - before.seconds  # the same clock on every process
            signum = next((s for s, count in zip(STOPPING, asked, strict=True) if count), 0)
            self.stop.signum = self.stop.signum or signum
            if self.failed is None and self.last.finite:
                progress.window_loss += loss
                progress.window_steps += 1
            self.failed = self.failed or (None if self.last.finite else self.last)

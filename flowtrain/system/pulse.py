"""Processes that watch each other, so that none waits for one that is lost.

A process that is killed or stopped, or whose machine is gone, falls silent. The others may wait for
it in an operation that no exception reaches, such as a sum over all GPUs. So threads watch.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

BEAT = 2.0  # seconds between two signs of life
SILENCE = 35.0  # seconds without one after which a process is lost
ANSWER = 5.0  # seconds that a process waits for the store before it ends without an answer
GONE = "gone"  # the last sign of a process that is done


class Pulse:
    """Gives signs of life of this process, and calls a function once others give none.

    Every `BEAT` seconds one thread writes a number that grows to the store, and reads those of the
    others. Another thread looks at the clock, because the first one may wait for a store whose
    machine is gone.

    Args:
        store: One that nothing else waits with. A store does one thing at a time.
        rank: The number of this process.
        world: How many processes there are.
        lost: Called once, in a thread, with the numbers of the processes that are silent.
    """

    def __init__(
        self, store: dist.Store, rank: int, world: int, lost: Callable[[list[int]], None]
    ) -> None:
        self.store, self.rank, self.lost = store, rank, lost
        self.beats = 0
        self.looked = time.monotonic()
        self.heard = {other: self.looked for other in range(world) if other != rank}
        self.signs = dict.fromkeys(self.heard, "")
        self.over = threading.Event()
        self._say("0")
        self.threads = [
            threading.Thread(target=target, name="pulse", daemon=True)
            for target in (self._speak_and_listen, self._watch)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Says that this process is done. From here on its silence means nothing."""
        if self.over.is_set():
            return
        self.over.set()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(ANSWER)
        if not self.threads[0].is_alive():  # else the store does not answer
            with contextlib.suppress(RuntimeError):
                self._say(GONE)

    def beat(self) -> None:
        """Gives a sign of life, and notes those of the others. Waits for the store."""
        self.beats += 1
        with contextlib.suppress(RuntimeError):  # The connection is lost, so all are silent.
            self._say(str(self.beats))
            for other, before in self.signs.items():
                key = f"pulse/{other}"
                sign = self.store.get(key).decode() if self.store.check([key]) else ""
                if sign != before or sign == GONE:
                    self.signs[other], self.heard[other] = sign, time.monotonic()

    def silent(self) -> list[int]:
        """The processes that are lost. To be asked every `BEAT` seconds or more often."""
        now = time.monotonic()
        if now - self.looked > 2 * BEAT:
            # This process stood still, perhaps with all others, as when a job is suspended.
            self.heard = dict.fromkeys(self.heard, now)
        self.looked = now
        return [other for other, when in self.heard.items() if now - when > SILENCE]

    def _say(self, sign: str) -> None:
        self.store.set(f"pulse/{self.rank}", sign)

    def _speak_and_listen(self) -> None:
        while not self.over.wait(BEAT):
            self.beat()

    def _watch(self) -> None:
        while not self.over.wait(BEAT / 2):
            if silent := self.silent():
                self.lost(silent)
                return

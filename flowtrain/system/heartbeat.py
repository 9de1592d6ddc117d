"""Heartbeats of processes, so that none waits for a lost one: killed, stopped, or on a machine that
is gone. Threads watch them, because no exception reaches an operation such as a sum over all GPUs.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

INTERVAL_SECONDS = 2.0  # between two heartbeats
TIMEOUT_SECONDS = 35.0  # without a heartbeat: the process is lost
STORE_SECONDS = 5.0  # a process waits so long for the store before it ends without an answer
GONE = "gone"  # the last heartbeat, of a process that is done


class Heartbeat:
    """Sends the heartbeats of this process, and calls a function once others are missing.

    Every `INTERVAL_SECONDS` one thread writes a growing number to the store, and reads the
    others. Another thread looks at the clock, because the first one may wait for a store whose
    machine is gone.

    Args:
        store: A connection of its own, because a store does one thing at a time.
        rank: The number of this process among all `world`.
        lost: Called once, in a thread, with the numbers of the lost processes.
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
        self._send("0")
        self.threads = [
            threading.Thread(target=target, name="heartbeat", daemon=True)
            for target in (self._send_and_read, self._watch)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self, done: bool = True) -> None:
        """Ends the heartbeats. The last one tells the others that this process is done, and not
        lost. If it has failed, they miss it, because no error reaches one that waits on a GPU.
        """
        if self.over.is_set():
            return
        self.over.set()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(STORE_SECONDS)
        if done and not self.threads[0].is_alive():  # else the store does not answer
            with contextlib.suppress(RuntimeError):
                self._send(GONE)

    def beat(self) -> None:
        """Sends a heartbeat, and reads the others'. Waits for the store."""
        self.beats += 1
        with contextlib.suppress(RuntimeError):  # The connection is lost, so all are silent.
            self._send(str(self.beats))
            for other, before in self.signs.items():
                key = f"heartbeat/{other}"
                sign = self.store.get(key).decode() if self.store.check([key]) else ""
                if sign != before or sign == GONE:
                    self.signs[other], self.heard[other] = sign, time.monotonic()

    def silent(self) -> list[int]:
        """The processes that are lost. To be called every `INTERVAL_SECONDS` or more often."""
        now = time.monotonic()
        if now - self.looked > 2 * INTERVAL_SECONDS:
            # This process stood still, perhaps with all others, as when a job is suspended.
            self.heard = dict.fromkeys(self.heard, now)
        self.looked = now
        return [other for other, when in self.heard.items() if now - when > TIMEOUT_SECONDS]

    def _send(self, sign: str) -> None:
        self.store.set(f"heartbeat/{self.rank}", sign)

    def _send_and_read(self) -> None:
        while not self.over.wait(INTERVAL_SECONDS):
            self.beat()

    def _watch(self) -> None:
        while not self.over.wait(INTERVAL_SECONDS / 2):
            if silent := self.silent():
                self.lost(silent)
                return

"""One thread that computes the results of requests, the newest request of a tab first.

A request supersedes an earlier one of the same tab and topic, and a closed page cancels its own. A
waiting one is dropped, and one that has begun ends at its next layer. In idle times the thread
computes what needs no request.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flowtrain.tools.explore.requests import Refused

K = TypeVar("K")
T = TypeVar("T")
Check = Callable[[], None]  # raises `Superseded` if a result is no longer wanted

ENDED = "flowtrain explore was ended"
WAITING = 64  # requests, of all tabs
TABS = 256  # pairs of tab and topic whose newest turn is kept


class Superseded(Refused):
    """The result is no longer wanted, such as for a newer request of the same tab and topic."""

    def __init__(self) -> None:
        super().__init__("there is a newer request", 409)


def keep(kept: OrderedDict[K, T], key: K, value: T, most: int) -> None:
    """Adds a value as the newest of at most so many."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


@dataclass(order=True)
class _Job:
    urgency: int  # the lower, the sooner
    number: int
    key: tuple[str, str] = field(compare=False)  # tab and topic
    call: Callable[[Check], Any] = field(compare=False)
    # It is done as soon as the result is not wanted, and never running, so that it can be cancelled
    future: "Future[Any]" = field(compare=False)

    def check(self) -> None:
        if self.future.done():
            raise Superseded

    def compute(self) -> None:
        try:
            self.check()
            result = self.call(self.check)
        except BaseException as error:  # the thread that waits raises it
            self.fail(error)
        else:
            with suppress(InvalidStateError):
                self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Worker:
    """Computes one thing at a time. `submit` may be called from any thread.

    Args:
        idle: Does a small part of the work without a request, and returns whether there is more.
            Its argument raises `Superseded` once a request waits; the part is begun again later.
    """

    def __init__(self, idle: Callable[[Check], bool] = lambda check: False):
        self._idle = idle
        self._more = True  # idle work
        self._jobs: list[_Job] = []
        self._computed: _Job | None = None  # at this moment
        self._newest: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._count = 0
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="explore", daemon=True)
        self._thread.start()

    def submit(
        self,
        call: Callable[[Check], T],
        tab: str,
        topic: str,
        turn: int,
        urgency: int = 0,
        outdates: Sequence[str] = (),
    ) -> "Future[T]":
        """The future result of `call(check)`. Cancelling the future gives it up.

        It supersedes earlier requests of this tab and topic, and of the topics that it `outdates`.
        The lower its `urgency`, the sooner it is computed.

        Raises:
            Superseded: if a newer request of this tab and topic came first.
            Refused: if too many wait, or after `stop`.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._ended:
                raise Refused(ENDED, 503)
            key = (tab, topic)
            if turn < self._newest.get(key, turn):
                raise Superseded
            outdated = {(tab, each) for each in (topic, *outdates)}
            self._fail(lambda job: job.key in outdated, Superseded())
            if len(self._jobs) >= WAITING:
                raise Refused("too many requests wait: try again in a moment", 503)
            self._count += 1
            keep(self._newest, key, turn, TABS)
            self._jobs.append(_Job(urgency, self._count, key, call, future))
            self._changed.notify()
        return future

    def _fail(self, which: Callable[[_Job], bool], why: Refused) -> None:
        for job in [*self._jobs, self._computed]:
            if job and which(job):
                job.fail(why)
        self._jobs = [job for job in self._jobs if not job.future.done()]

    def wake(self) -> None:
        """There is new idle work."""
        with self._changed:
            self._more = True
            self._changed.notify()

    def stop(self) -> None:
        """Fails all requests, and lets the thread end after its current work."""
        with self._changed:
            self._ended = True
            self._fail(lambda job: True, Refused(ENDED, 503))
            self._changed.notify()

    def end(self) -> None:
        self.stop()
        self._thread.join()

    def _check_idle(self) -> None:
        if self._jobs or self._ended:
            raise Superseded

    def _run(self) -> None:
        while True:
            with self._changed:
                self._computed = None  # nothing here keeps its result
                self._changed.wait_for(lambda: self._jobs or self._more or self._ended)
                if self._ended:
                    return
                if self._jobs:
                    self._computed = min(self._jobs)
                    self._jobs.remove(self._computed)
                else:
                    self._more = False  # until `idle` has more, or `wake` is called
            if self._computed:
                self._computed.compute()
                continue
            try:
                more = self._idle(self._check_idle)
            except Superseded:
                more = True
            except Exception as error:  # requests are still served
                logging.getLogger("flowtrain").error("explore: %s", error, exc_info=error)
                more = False
            if more:
                self._more = True

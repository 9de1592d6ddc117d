"""One thread that computes what pages ask for, the newest request of a tab first.

A request supersedes an earlier one of the same tab and topic. One that waits is dropped, and one
that is computed ends at its next layer. In idle times the thread computes what needs no request.
"""

import heapq
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flowtrain.explore.asked import Refused

T = TypeVar("T")
Check = Callable[[], None]  # raises `Superseded` where a result is no longer wanted

WAITING = 64  # requests, of all tabs
TABS = 256  # pairs of tab and topic of which the newest turn is remembered


class Superseded(Refused):
    """There is a newer request of the same tab and topic."""

    status = 409


class Busy(Refused):
    """Too many requests wait."""

    status = 503


@dataclass(order=True)
class _Job:
    urgency: int  # the lower, the sooner
    number: int
    call: Callable[[Check], Any] = field(compare=False)
    future: "Future[Any]" = field(compare=False)
    stale: bool = field(compare=False, default=False)

    def check(self) -> None:
        if self.stale:
            raise Superseded("there is a newer request")

    def compute(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.check()
            result = self.call(self.check)
        except BaseException as error:  # the thread that waits raises it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Worker:
    """Computes one thing at a time. `submit` may be called from any thread.

    Args:
        idle: Does a small part of what is not asked for, and says whether there is more. Its
            argument raises `Superseded` once a request waits; the part is then begun again later.
    """

    def __init__(self, idle: Callable[[Check], bool] = lambda check: False):
        self._idle = idle
        self._more = True  # idle work
        self._jobs: list[_Job] = []
        self._newest: OrderedDict[tuple[str, str], tuple[int, _Job]] = OrderedDict()
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
        """The future result of `call(check)`.

        It supersedes earlier requests of this tab and topic, and of the topics that it `outdates`.
        The lower its `urgency`, the sooner it is computed.

        Raises `Superseded` where a newer request of this tab and topic came first, and `Busy` where
        too many wait.
        """
        future: Future[T] = Future()
        with self._changed:
            key = (tab, topic)
            if key in self._newest and turn < self._newest[key][0]:
                raise Superseded("there is a newer request")
            for each in (topic, *outdates):
                self._drop((tab, each))
            if len(self._jobs) >= WAITING:
                raise Busy("too many requests wait: try again in a moment")
            self._count += 1
            job = _Job(urgency, self._count, call, future)
            self._newest[key] = (turn, job)
            self._newest.move_to_end(key)
            while len(self._newest) > TABS:
                self._newest.popitem(last=False)
            heapq.heappush(self._jobs, job)
            self._changed.notify()
        return future

    def _drop(self, key: tuple[str, str]) -> None:
        if key in self._newest:
            _, job = self._newest[key]
            job.stale = True
            if job in self._jobs:
                self._jobs.remove(job)
                heapq.heapify(self._jobs)
                job.fail(Superseded("there is a newer request"))

    def wake(self) -> None:
        """There is new idle work."""
        with self._changed:
            self._more = True
            self._changed.notify()

    def end(self) -> None:
        """Ends the thread after what it computes now. What waits is dropped."""
        with self._changed:
            self._ended = True
            for job in self._jobs:
                job.fail(Superseded("the server ends"))
            self._jobs.clear()
            for _, job in self._newest.values():
                job.stale = True
            self._changed.notify()
        self._thread.join()

    def _check_idle(self) -> None:
        if self._jobs or self._ended:
            raise Superseded("a request waits")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._more or self._ended):
                    self._changed.wait()
                if self._ended:
                    return
                job = heapq.heappop(self._jobs) if self._jobs else None
                if job is None:
                    self._more = False  # until `idle` says otherwise, or `wake` is called
            if job is not None:
                job.compute()
                continue
            try:
                more = self._idle(self._check_idle)
            except Superseded:
                more = True
            except Exception as error:  # requests are answered all the same
                logging.getLogger("flowtrain").error("explore: %s", error, exc_info=error)
                more = False
            if more:
                self._more = True

"""The thread of the explorer: the newest request of a tab counts, idle work makes way."""

import gc
import threading
import weakref
from unittest.mock import Mock

import pytest
from explore_helpers import until

from flowtrain.tools.explore import worker as module
from flowtrain.tools.explore.requests import Refused
from flowtrain.tools.explore.worker import WAITING, Superseded, Worker

SECONDS = 20  # a test that waits longer has failed


class Gate:
    """A request that has begun, and goes on when it is told to."""

    finished = False

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, check):
        self.begun.set()
        assert self.go.wait(SECONDS)
        check()
        self.finished = True


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.end()


def busy(worker, tab="other"):
    gate = Gate()
    future = worker.submit(gate, tab, "show", 0)
    assert gate.begun.wait(SECONDS)
    return gate, future


def superseded(future):
    with pytest.raises(Superseded):
        future.result(SECONDS)
    return True


def test_the_newest_request_of_a_tab_is_computed(worker):
    gate, first = busy(worker, "tab")  # which ends at its next layer
    computed = []
    futures = [
        worker.submit(lambda check, turn=turn: computed.append(turn), "tab", "show", turn)
        for turn in range(5)
    ]
    others = [
        worker.submit(lambda check, name=name: name, name, topic, 3)
        for name, topic in (("a", "show"), ("a", "facts"), ("b", "show"), ("tab", "facts"))
    ]
    # A move outdates the request for the figures of the image before.
    outdated = worker.submit(lambda check: "facts", "c", "facts", 1)
    worker.submit(lambda check: "show", "c", "show", 2, outdates=["facts"])
    gate.go.set()
    futures[-1].result(SECONDS)
    assert computed == [4] and all(map(superseded, [first, *futures[:-1], outdated]))
    assert [future.result(SECONDS) for future in others] == ["a", "a", "b", "tab"]
    with pytest.raises(Superseded):  # it comes late
        worker.submit(lambda check: None, "tab", "show", 3)


def test_the_urgent_come_first(worker):
    gate, _ = busy(worker)
    order = []
    futures = [
        worker.submit(lambda check, n=n: order.append(n), f"tab{n}", "x", 0, urgency)
        for n, urgency in enumerate((3, 1, 2, 1, 0))
    ]
    gate.go.set()
    for future in futures:
        future.result(SECONDS)
    assert order == [4, 1, 3, 2, 0]


def test_too_many_are_refused_and_the_rest_is_computed(worker):
    gate, _ = busy(worker)
    futures = [worker.submit(lambda check: 1, f"tab{i}", "show", 0) for i in range(WAITING)]
    with pytest.raises(Refused, match="too many requests wait"):
        worker.submit(lambda check: 1, "one more", "show", 0)
    gate.go.set()
    assert sum(future.result(SECONDS) for future in futures) == WAITING


def test_a_request_that_is_cancelled_is_given_up(worker):
    """As the web server does for a page that is gone."""
    gate, first = busy(worker)
    waiting = [worker.submit(lambda check: 1, f"tab{i}", "show", 0) for i in range(WAITING)]
    assert all(future.cancel() for future in (first, *waiting))
    last = worker.submit(lambda check: 2, "tab", "facts", 0)  # those that are gone take no place
    gate.go.set()
    assert last.result(SECONDS) == 2 and not gate.finished


def test_results_and_old_tabs_are_not_kept(worker, monkeypatch):
    class Answer:
        pass

    answers = []
    for turn in range(3):
        answer = worker.submit(lambda check: Answer(), "tab", "show", turn).result(SECONDS)
        answers.append(weakref.ref(answer))
    del answer
    monkeypatch.setattr(module, "TABS", 1)
    worker.submit(lambda check: None, "other", "show", 0).result(SECONDS)
    assert list(worker._newest) == [("other", "show")]
    gc.collect()
    assert [each() for each in answers] == [None] * 3


def test_idle_work_makes_way_and_goes_on():
    parts, gate = [], Gate()

    def idle(check):
        parts.append(len(parts))
        if len(parts) == 1:
            gate(check)  # raises, because a request waits
        return len(parts) < 4

    worker = Worker(idle)
    assert gate.begun.wait(SECONDS)
    future = worker.submit(lambda check: list(parts), "tab", "show", 0)
    gate.go.set()
    assert future.result(SECONDS) == [0]
    until(lambda: len(parts) == 4)
    worker.submit(lambda check: 1, "tab", "show", 1).result(SECONDS)
    assert parts == [0, 1, 2, 3]
    worker.wake()
    until(lambda: len(parts) == 5)
    worker.end()
    assert parts == [0, 1, 2, 3, 4]


def test_idle_work_that_fails_is_not_tried_again(caplog):
    idle = Mock(side_effect=RuntimeError("broken"))
    worker = Worker(idle)
    for turn in range(2):
        assert worker.submit(lambda check: 1, "tab", "show", turn).result(SECONDS) == 1
    worker.end()
    assert idle.call_count == 1 and "broken" in caplog.text


def test_ending_drops_requests():
    worker = Worker()
    gate, running = busy(worker)
    waiting = worker.submit(lambda check: 1, "tab", "show", 0)
    ender = threading.Thread(target=worker.end)
    ender.start()
    for future in (running, waiting):
        with pytest.raises(Refused, match="was ended"):
            future.result(SECONDS)
    with pytest.raises(Refused, match="was ended"):
        worker.submit(lambda check: 1, "tab", "show", 1)
    gate.go.set()
    ender.join(SECONDS)
    assert not ender.is_alive()

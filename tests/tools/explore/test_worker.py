"""The thread of the explorer: the newest request of a tab counts, idle work makes way."""

import gc
import threading
import weakref

import pytest

from flowtrain.tools.explore.worker import WAITING, Busy, Superseded, Worker

SECONDS = 20  # a test that waits longer has failed


class Gate:
    """A request that has begun, and goes on when it is told to."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, check):
        self.begun.set()
        assert self.go.wait(SECONDS)
        check()
        return "done"


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


def test_the_newest_request_of_a_tab_is_computed(worker):
    gate, first = busy(worker)
    computed = []
    futures = [
        worker.submit(lambda check, turn=turn: computed.append(turn), "tab", "show", turn)
        for turn in range(5)
    ]
    gate.go.set()
    assert first.result(SECONDS) == "done"
    futures[-1].result(SECONDS)
    assert computed == [4]
    for future in futures[:-1]:
        with pytest.raises(Superseded):
            future.result(SECONDS)


def test_a_request_that_is_computed_ends_at_its_next_layer(worker):
    gate, first = busy(worker, "tab")
    second = worker.submit(lambda check: "second", "tab", "show", 1)
    gate.go.set()
    with pytest.raises(Superseded):
        first.result(SECONDS)
    assert second.result(SECONDS) == "second"


def test_requests_of_other_tabs_and_topics_stay(worker):
    gate, _ = busy(worker)
    futures = [
        worker.submit(lambda check, name=name: name, name, topic, 3)
        for name in ("a", "b")
        for topic in ("show", "facts")
    ]
    gate.go.set()
    assert [future.result(SECONDS) for future in futures] == ["a", "a", "b", "b"]


def test_a_move_outdates_what_was_asked_of_the_image_before(worker):
    gate, _ = busy(worker)
    facts = worker.submit(lambda check: "facts", "tab", "facts", 1)
    worker.submit(lambda check: "show", "tab", "show", 2, outdates=["facts"])
    gate.go.set()
    with pytest.raises(Superseded):
        facts.result(SECONDS)


def test_a_request_that_comes_late_is_not_computed(worker):
    worker.submit(lambda check: None, "tab", "show", 7).result(SECONDS)
    with pytest.raises(Superseded):
        worker.submit(lambda check: None, "tab", "show", 6)


def test_the_urgent_come_first(worker):
    gate, _ = busy(worker)
    order = []
    futures = [
        worker.submit(lambda check, u=urgency: order.append(u), f"tab{urgency}", "x", 0, urgency)
        for urgency in (3, 1, 2, 0)
    ]
    gate.go.set()
    for future in futures:
        future.result(SECONDS)
    assert order == [0, 1, 2, 3]


def test_too_many_are_refused_and_the_rest_is_answered(worker):
    gate, _ = busy(worker)
    futures = [worker.submit(lambda check: 1, f"tab{i}", "show", 0) for i in range(WAITING)]
    with pytest.raises(Busy):
        worker.submit(lambda check: 1, "one more", "show", 0)
    gate.go.set()
    assert sum(future.result(SECONDS) for future in futures) == WAITING


def test_errors_reach_who_asked_and_the_thread_goes_on(worker):
    def fails(check):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker.submit(fails, "tab", "show", 0).result(SECONDS)
    assert worker.submit(lambda check: 2, "tab", "show", 1).result(SECONDS) == 2


def test_a_request_that_is_cancelled_is_given_up(worker):
    """As the web server does for a page that is gone."""
    begun, go, stopped = threading.Event(), threading.Event(), []

    def call(check):
        begun.set()
        assert go.wait(SECONDS)
        with pytest.raises(Superseded):
            check()
        stopped.append(True)

    futures = [worker.submit(call, "tab", "show", 0)]
    assert begun.wait(SECONDS)
    futures += [worker.submit(lambda check: 1, f"tab{i}", "show", 0) for i in range(WAITING)]
    assert all(future.cancel() for future in futures)
    last = worker.submit(lambda check: 2, "tab", "facts", 0)  # those that are gone take no place
    go.set()
    assert last.result(SECONDS) == 2 and stopped


def test_answers_are_not_kept(worker):
    class Answer:
        pass

    answers = []
    for turn in range(3):
        answer = worker.submit(lambda check: Answer(), "tab", "show", turn).result(SECONDS)
        answers.append(weakref.ref(answer))
    del answer
    worker.submit(lambda check: None, "other", "show", 0).result(SECONDS)
    gc.collect()
    assert [each() for each in answers] == [None] * 3


def test_idle_work_makes_way_and_goes_on():
    parts, gate, all_done = [], Gate(), threading.Event()

    def idle(check):
        parts.append(len(parts))
        if len(parts) == 1:
            gate(check)  # raises, because a request waits
        if len(parts) == 4:
            all_done.set()
        return len(parts) < 4

    worker = Worker(idle)
    assert gate.begun.wait(SECONDS)
    future = worker.submit(lambda check: list(parts), "tab", "show", 0)
    gate.go.set()
    assert future.result(SECONDS) == [0]
    assert all_done.wait(SECONDS)
    worker.end()
    assert parts == [0, 1, 2, 3]


def test_idle_work_that_fails_is_not_tried_again(caplog):
    calls = []

    def idle(check):
        calls.append(1)
        raise RuntimeError("broken")

    worker = Worker(idle)
    assert worker.submit(lambda check: 1, "tab", "show", 0).result(SECONDS) == 1
    worker.submit(lambda check: 1, "tab", "show", 1).result(SECONDS)
    worker.end()
    assert calls == [1] and "broken" in caplog.text


def test_waking_begins_idle_work_again():
    done = threading.Event()
    ready = []

    def idle(check):
        if ready:
            done.set()
        return False

    worker = Worker(idle)
    worker.submit(lambda check: 1, "tab", "show", 0).result(SECONDS)
    ready.append(True)
    worker.wake()
    assert done.wait(SECONDS)
    worker.end()


def test_ending_drops_what_waits():
    worker = Worker()
    gate, first = busy(worker)
    waiting = worker.submit(lambda check: 1, "tab", "show", 0)
    ender = threading.Thread(target=worker.end)
    ender.start()
    with pytest.raises(Superseded):
        waiting.result(SECONDS)
    gate.go.set()
    ender.join(SECONDS)
    assert not ender.is_alive()

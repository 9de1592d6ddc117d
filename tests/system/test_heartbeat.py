"""Heartbeats."""

import threading
import types
from unittest import mock

import pytest
import torch.distributed as dist

from flowtrain.system import heartbeat
from flowtrain.system.heartbeat import INTERVAL_SECONDS, TIMEOUT_SECONDS, Heartbeat


@pytest.fixture
def clock(monkeypatch):
    """Stands still until a test moves it. The threads of a heartbeat do nothing meanwhile."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(threading.Thread, "join", lambda thread, seconds: None)
    return clock


def pass_time(clock, seconds, speaking, watching):
    """What `watching` misses after so many seconds in which only some processes speak."""
    for _ in range(round(seconds / INTERVAL_SECONDS)):
        clock.now += INTERVAL_SECONDS
        for each in speaking:
            each.beat()
        silent = watching.silent()
    return silent


def three(store=None):
    store = store or dist.HashStore()
    return [Heartbeat(store, rank, 3, lambda lost: None) for rank in range(3)]


def test_who_falls_silent_is_lost(clock):
    """Who is done is not, and who has failed is."""
    a, b, c = three()
    assert pass_time(clock, 5 * TIMEOUT_SECONDS, [a, b, c], a) == []
    assert pass_time(clock, TIMEOUT_SECONDS - INTERVAL_SECONDS, [a, c], a) == []
    assert pass_time(clock, 3 * INTERVAL_SECONDS, [a, c], a) == [1]
    c.stop()
    assert pass_time(clock, 3 * TIMEOUT_SECONDS, [a, b], a) == []
    b.stop(done=False)
    assert pass_time(clock, TIMEOUT_SECONDS + 3 * INTERVAL_SECONDS, [a], a) == [1]
    alone = Heartbeat(dist.HashStore(), 0, 3, lambda lost: None)
    assert pass_time(clock, TIMEOUT_SECONDS - INTERVAL_SECONDS, [alone], alone) == []
    assert pass_time(clock, 2 * INTERVAL_SECONDS, [alone], alone) == [1, 2]


def test_without_the_store_all_others_are_lost(clock):
    store = mock.Mock(check=lambda keys: False)
    a, *_ = three(store)
    store.set.side_effect = RuntimeError("Connection reset by peer")
    assert pass_time(clock, TIMEOUT_SECONDS + INTERVAL_SECONDS, [a], a) == [1, 2]
    a.stop()  # no error


def test_a_job_that_was_suspended_goes_on(clock):
    processes = a, b, _ = three()
    clock.now += 10 * TIMEOUT_SECONDS
    assert a.silent() == []
    assert pass_time(clock, TIMEOUT_SECONDS - INTERVAL_SECONDS, [a], a) == []
    assert pass_time(clock, 2 * TIMEOUT_SECONDS, processes, b) == []

"""How many threads a command uses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowtrain.system import threads


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 cores, of which this process may use some."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def with_load(busy, allowed=8, affinity=range(8)):
        monkeypatch.setattr(threads.psutil, "cpu_percent", lambda seconds, percpu: busy)
        monkeypatch.setattr(threads.joblib, "cpu_count", lambda: allowed)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(affinity))

    return with_load


@pytest.mark.parametrize(
    "busy, limits, expected",
    [
        *(([0] * 8, {}, 8), ([0, 3, 2, 5, 1, 0, 0, 4], {}, 8), ([100] * 3 + [0] * 5, {}, 5)),
        *(([100] * 8, {}, 1), ([50] * 8, {}, 4)),
        *(([0] * 8, {"allowed": 2}, 2), ([100] * 4 + [0] * 4, {"allowed": 2}, 2)),
        ([0, 0, 100, 100, 0, 0, 0, 0], {"allowed": 2, "affinity": (2, 3)}, 1),
    ],
)
def test_threads_are_as_many_as_cores_are_free(busy, limits, expected, machine):
    machine(busy, **limits)
    said = threads.use_free_cores()
    assert torch.get_num_threads() == expected
    assert (said is None) == (expected == limits.get("allowed", 8))
    assert said is None or said.startswith(f"threads: {expected}, because about")


def test_the_number_of_threads_of_a_user_and_of_a_run(machine, monkeypatch):
    machine([100] * 8, allowed=4)
    assert threads.as_before(2) == "threads: 2, as before; OMP_NUM_THREADS sets another number"
    assert torch.get_num_threads() == 2 and threads.as_before(2) is None
    threads.as_before(6)  # on a larger machine
    assert torch.get_num_threads() == 4
    with threads.one_thread() as before:
        assert (before, torch.get_num_threads()) == (4, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.as_before(1)
    assert threads.use_free_cores() is None and torch.get_num_threads() == 4


def test_a_thread_that_begins_meanwhile_leaves_the_number_to_others():
    torch.set_num_threads(4)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as later:
        with threads.one_thread():
            inner = threads.one_thread()
            pool.submit(inner.__enter__).result()
        pool.submit(inner.__exit__, None, None, None).result()
        assert later.submit(torch.get_num_threads).result() == 4


def test_free_cores_of_this_machine():
    assert 0 <= threads.free_cores() <= threads.joblib.cpu_count()

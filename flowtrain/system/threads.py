"""The number of threads that torch uses for one operation."""

import contextlib
import os
from collections.abc import Iterator

import joblib
import psutil
import torch

LOOK_SECONDS = 0.1  # for which the cores are watched


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Lets torch use one thread meanwhile. Gives the number of threads that it had."""
    threads = torch.get_num_threads()
    # A thread of Python that begins meanwhile has 1 too, and must not restore that for all others.
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def use_free_cores() -> str | None:
    """Lets torch use as many threads as cores are free, and at least one: with more threads, each
    operation waits for a core, which is many times slower. If OMP_NUM_THREADS is set, as torchrun
    does, nothing changes. Returns a line for the user if fewer threads are used than there are
    cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    allowed, free = joblib.cpu_count(), free_cores()
    threads = max(1, round(free))
    torch.set_num_threads(threads)
    if threads == allowed:
        return None
    return (
        f"threads: {threads}, because about {max(0.0, allowed - free):.1f} of {allowed} cores are "
        f"busy; OMP_NUM_THREADS sets another number"
    )


def as_before(threads: int) -> str | None:
    """Lets torch use the number of threads that an earlier part of a run had, unless the user has
    set one. With another number, sums are added in another order. Returns a line for the user if
    the number changes.
    """
    threads = min(threads, joblib.cpu_count())
    if "OMP_NUM_THREADS" in os.environ or threads == torch.get_num_threads():
        return None
    torch.set_num_threads(threads)
    return f"threads: {threads}, as before; OMP_NUM_THREADS sets another number"


def free_cores() -> float:
    """How many cores other processes leave idle, of those that this process may use. The limits are
    those of the process (affinity) and of its container (cgroup quota).
    """
    busy: list[float] = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    if hasattr(os, "sched_getaffinity"):
        mine = os.sched_getaffinity(0)
        busy = [percent for core, percent in enumerate(busy) if core in mine] or busy
    return min(float(joblib.cpu_count()), sum(1 - percent / 100 for percent in busy))

"""Tasks in threads. Each computes with one thread of torch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from flowtrain.system.threads import one_thread

Progress = Callable[[int, int], None]  # images done, and all of them
Tick = Callable[[int], None]  # images done since the last call

T = TypeVar("T")


def in_threads(tasks: Sequence[Callable[[Tick], T]], total: int, progress: Progress) -> list[T]:
    """The results of tasks, as many at a time as torch has threads.

    Each task calls its argument with the number of images since the last call. The first task that
    fails ends all.
    """
    lock, stopped, done = threading.Lock(), threading.Event(), 0

    def tick(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise InterruptedError
        with lock:
            done += count
            progress(min(done, total), total)

    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(task, tick) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]

"""Tasks in threads."""

import time

import pytest
import torch

from flowtrain.tools.archive.threads import in_threads


def test_the_first_stream_that_fails_ends_all():
    def fails(tick):
        raise ValueError("the second")

    def slow(tick):
        for _ in range(2000):
            time.sleep(0.005)
            tick(1)
            ticks.append(1)

    torch.set_num_threads(2)
    ticks: list[int] = []
    with pytest.raises(ValueError, match="the second"):
        in_threads([slow, fails], 1, lambda done, total: None)
    assert len(ticks) < 2000

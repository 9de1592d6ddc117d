"""The numbers of a step come one step late, and all of them before anything is written."""

import math
import signal

import pytest
import torch
from helpers import a_config, tiny_flow

from flowtrain.system import distributed
from flowtrain.training.delayed_metrics import DelayedMetrics
from flowtrain.training.state import State
from flowtrain.training.stop import Clock, Stop


@pytest.fixture
def metrics():
    state = State(a_config(), tiny_flow(), [], None, {})
    return DelayedMetrics(state, Clock(state), Stop())


def send(metrics, *losses):
    progress = metrics.state.progress
    for loss in losses:
        metrics.send(torch.tensor(loss), torch.ones(()), rate=0.1)
        progress.step += 1
        progress.images += 8


def test_the_last_step_is_not_waited_for(metrics, monkeypatch):
    asked = []
    total_later = distributed.total_later

    def noting(*numbers):
        read = total_later(*numbers)
        return lambda: (asked.append(numbers[0][0].item()), read())[1]

    monkeypatch.setattr(distributed, "total_later", noting)
    progress = metrics.state.progress
    send(metrics, 1.0)
    metrics.receive(leaving=1)
    assert asked == [] and metrics.last is None
    send(metrics, 2.0, 4.0)
    metrics.receive(leaving=1)
    assert asked == [1.0, 2.0] and metrics.last.step == 1 and metrics.last.images == 8
    assert (progress.window_loss, progress.window_steps) == (3.0, 2)
    metrics.receive(leaving=0)
    assert metrics.last.loss == 4.0 and metrics.last.grad_norm == 1.0 and metrics.last.rate == 0.1
    assert (progress.window_loss, progress.window_steps) == (7.0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_after_a_non_finite_step_none_counts(bad, metrics):
    progress = metrics.state.progress
    send(metrics, 1.0, bad, 2.0)
    metrics.receive(leaving=1)  # it waits for the third, too: it is over
    assert metrics.failed.step == 1 and metrics.failed.images == 8 and metrics.last.step == 2
    assert (progress.window_loss, progress.window_steps) == (1.0, 1)
    metrics.failed = None
    send(metrics, 3.0)
    metrics.receive(leaving=0)
    assert metrics.failed is None and progress.window_steps == 2
    metrics.send(torch.ones(()), torch.tensor(math.inf), rate=0.1)  # its norm
    metrics.receive(leaving=0)
    assert metrics.failed is not None and not metrics.failed.finite


def test_the_clock_is_that_of_process_0(metrics, monkeypatch):
    """This process adds the time since it has sent its numbers."""
    progress = metrics.state.progress
    progress.seconds = 50.0
    monkeypatch.setattr(
        distributed, "total_later", lambda device, host: lambda: [*device.tolist(), 100.0, 0, 0, 0]
    )
    send(metrics, 1.0)
    sent = progress.seconds
    progress.seconds += 7.0
    metrics.receive(leaving=0)
    assert metrics.seconds == 100.0
    assert progress.seconds == pytest.approx(107.0) and sent >= 50.0


def test_a_signal_is_heard_one_step_later_and_not_forgotten(metrics, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    send(metrics, 1.0)
    metrics.stop(signal.SIGTERM, None)
    send(metrics, 1.0)
    metrics.receive(leaving=1)
    assert metrics.stop.signum == 0  # the others do not know it yet
    send(metrics, 1.0)
    metrics.receive(leaving=1)
    assert metrics.stop.signum == signal.SIGTERM
    metrics.stop.asked = 0
    metrics.receive(leaving=0)
    assert metrics.stop.signum == signal.SIGTERM

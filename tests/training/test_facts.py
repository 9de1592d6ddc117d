"""What is known of the steps comes one step late, and is complete before anything is written."""

import math
import signal

import pytest
import torch
from helpers import a_config, tiny_flow

from flowtrain.system import distributed
from flowtrain.training.facts import Facts
from flowtrain.training.state import State
from flowtrain.training.stop import Clock, Stop


@pytest.fixture
def facts():
    state = State(a_config(), tiny_flow(), [], None, {})
    return Facts(state, Clock(state), Stop())


def send(facts, *losses):
    """Steps with these losses and a norm of 1."""
    progress = facts.state.progress
    for loss in losses:
        facts.send(torch.tensor(loss), torch.ones(()), rate=0.1)
        progress.step += 1
        progress.images += 8


def test_the_last_step_is_not_waited_for(facts, monkeypatch):
    asked = []
    total_later = distributed.total_later

    def noting(*numbers):
        read = total_later(*numbers)
        return lambda: (asked.append(numbers[0][0].item()), read())[1]

    monkeypatch.setattr(distributed, "total_later", noting)
    progress = facts.state.progress
    send(facts, 1.0)
    facts.receive(leaving=1)
    assert asked == [] and facts.last is None
    send(facts, 2.0, 4.0)
    facts.receive(leaving=1)
    assert asked == [1.0, 2.0] and facts.last.step == 1 and facts.last.images == 8
    assert (progress.window_loss, progress.window_steps) == (3.0, 2)
    facts.receive(leaving=0)
    assert facts.last.loss == 4.0 and facts.last.grad_norm == 1.0 and facts.last.rate == 0.1
    assert (progress.window_loss, progress.window_steps) == (7.0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_after_a_step_that_was_not_finite_none_counts(bad, facts):
    progress = facts.state.progress
    send(facts, 1.0, bad, 2.0)
    facts.receive(leaving=1)  # the third is waited for, too: it is over
    assert facts.failed.step == 1 and facts.failed.images == 8 and facts.last.step == 2
    assert (progress.window_loss, progress.window_steps) == (1.0, 1)
    facts.failed = None
    send(facts, 3.0)
    facts.receive(leaving=0)
    assert facts.failed is None and progress.window_steps == 2


def test_a_norm_that_is_not_finite_fails(facts):
    facts.send(torch.ones(()), torch.tensor(math.inf), rate=0.1)
    facts.receive(leaving=0)
    assert facts.failed is not None and not facts.failed.finite


def test_the_clock_is_that_of_process_0(facts, monkeypatch):
    """This process adds the time since it has sent its numbers."""
    progress = facts.state.progress
    progress.seconds = 50.0
    monkeypatch.setattr(
        distributed, "total_later", lambda device, host: lambda: [*device.tolist(), 100.0, 0, 0, 0]
    )
    send(facts, 1.0)
    sent = progress.seconds
    progress.seconds += 7.0
    facts.receive(leaving=0)
    assert facts.seconds == 100.0
    assert progress.seconds == pytest.approx(107.0) and sent >= 50.0


def test_a_signal_is_heard_one_step_later_and_not_forgotten(facts, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    send(facts, 1.0)
    facts.stop(signal.SIGTERM, None)
    send(facts, 1.0)
    facts.receive(leaving=1)
    assert facts.stop.signum == 0  # the others do not know it yet
    send(facts, 1.0)
    facts.receive(leaving=1)
    assert facts.stop.signum == signal.SIGTERM
    facts.stop.asked = 0
    facts.receive(leaving=0)
    assert facts.stop.signum == signal.SIGTERM

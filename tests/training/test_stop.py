"""Signals that end a run, and its clock."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch
from catalogue import SMALL
from cli_helpers import environment, summary, within
from helpers import a_config, tiny_flow

from flowtrain.checkpoints.description import Progress
from flowtrain.errors import UserError
from flowtrain.system.console import console
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.step import require_trainable
from flowtrain.training.stop import Clock, signals

ENDLESS = ["train", *SMALL, "train.num_steps=100_000", "train.log_every=1", "--run-dir", "r"]


def on_a_terminal(words, cwd, **options):
    """A command, and the other end of its terminal of eighty columns."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {k: v for k, v in environment(TERM="xterm").items() if k != "COLUMNS"}
    command = [sys.executable, "-m", "flowtrain", *words]
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=terminal, stdout=terminal, stderr=terminal, **options
    )
    os.close(terminal)
    return process, main


@pytest.mark.run
def test_a_closed_terminal_saves_and_ends(tmp_path):
    """Nobody can read what is printed any more, and that is no error."""
    process, main = on_a_terminal(
        [*ENDLESS, "train.validate_every=1"],
        tmp_path,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    metrics = tmp_path / "r" / "metrics.jsonl"
    os.set_blocking(main, False)
    try:
        with within(60, "step 3") as expired:
            while not metrics.exists() or metrics.read_text().count('"train"') < 3:
                expired()
                with contextlib.suppress(BlockingIOError):
                    os.read(main, 65536)
        os.close(main)
        assert process.wait(60) == 129
    finally:
        process.kill()
    assert summary(tmp_path / "r")["step"] >= 3


@pytest.mark.run
def test_a_run_continues_if_the_reader_of_its_output_leaves(tmp_path, monkeypatch):
    """As in `train ... | head -8`."""
    monkeypatch.setattr(console, "outlives_terminal", False)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(console, "_file", output)
        fit(a_config("nice"), RunDirectory(tmp_path / "r"), torch.device("cpu"))
    assert summary(tmp_path / "r")["finished"]


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_left_follows_from_the_speed_of_this_part():
    """An earlier part of the run took 4 s for a step, this one takes half a second."""
    progress = Progress(step=1000, seconds=4000.0)
    train = SimpleNamespace(budget=None, num_steps=1100, clock="wall")
    clock = Clock(SimpleNamespace(progress=progress, config=SimpleNamespace(train=train)))
    progress.step, progress.seconds = 1010, 4005.0
    assert clock.seconds_left() == pytest.approx(45)
    train.budget, train.num_steps = 5000, None
    assert clock.seconds_left() == pytest.approx(995)


@pytest.mark.parametrize("clock, seconds, speed", [("wall", 17.0, 1.0), ("processor", 4.0, 2.0)])
def test_processor_time_is_that_of_steps(clock, seconds, speed, monkeypatch):
    """A step takes 4 s of the processor and 8 s by the wall clock, a validation 4 s and 9 s."""
    now = [0.0, 0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[1])
    state = SimpleNamespace(progress=Progress(), config=a_config(train={"clock": clock}))
    measured = Clock(state)
    now[:] = 4.0, 9.0
    measured.skip()
    now[:] = 8.0, 17.0
    measured.tick(images=8)
    assert state.progress.seconds == seconds
    assert measured.images_per_second(begin_anew=True) == speed


def test_processor_time_needs_a_cpu():
    config = a_config(train={"clock": "processor"})
    require_trainable(tiny_flow("glow"), config, torch.device("cpu"))
    with pytest.raises(UserError, match="train.clock: processor time does not measure"):
        require_trainable(tiny_flow("glow"), config, torch.device("cuda"))


@pytest.mark.run
def test_the_bar_shows_each_step(tmp_path):
    """Also if the period of log lines never comes."""
    words = ["train", *SMALL, "train.num_steps=30", "train.log_every=1000", "--run-dir", "r"]
    process, main = on_a_terminal(words, tmp_path)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while part := os.read(main, 65536):
            shown += part
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "\n").splitlines()
    bars = [line for line in lines if line.startswith("training") and "left" in line]
    text = r" \d+:\d\d left  step \d+/30  \d\.\d+ bits/dim  \d+ images/s"
    assert any(re.search(text, bar) for bar in bars)
    assert max(map(len, bars)) <= 80

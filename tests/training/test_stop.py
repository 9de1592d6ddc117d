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
from types import SimpleNamespace

import pytest
import torch
from catalogue import SMALL, sets
from cli_helpers import environment, summary, within
from helpers import a_config

from flowtrain.checkpoints.description import Progress
from flowtrain.system.console import console
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.stop import Clock, signals

ENDLESS = ["train", *SMALL, *sets(train__num_steps=100_000, train__log_every=1), "--run-dir", "r"]


def logged(run, step):
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count('"train"') >= step


def test_a_closed_terminal_saves_and_ends(tmp_path):
    """Nobody can read what is printed any more, and that is no error."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", *ENDLESS, *sets(train__validate_every=1)],
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    os.set_blocking(main, False)
    try:
        with within(60, "step 3") as expired:
            while not logged(tmp_path / "r", 3):
                expired()
                with contextlib.suppress(BlockingIOError):
                    os.read(main, 65536)
        os.close(main)
        assert process.wait(60) == 129
    finally:
        process.kill()
    assert summary(tmp_path / "r")["step"] >= 3


def test_a_run_goes_on_if_the_reader_of_its_output_leaves(tmp_path, monkeypatch):
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
        assert stop.asked == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_left_is_that_of_this_parts_speed():
    """An earlier part of the run took 4 s for a step, this one takes half a second."""
    progress = Progress(step=1000, seconds=4000.0)
    train = SimpleNamespace(budget=None, num_steps=1100)
    clock = Clock(SimpleNamespace(progress=progress, config=SimpleNamespace(train=train)))
    progress.step, progress.seconds = 1010, 4005.0
    assert clock.seconds_left() == pytest.approx(45)
    train.budget, train.num_steps = 5000, None
    assert clock.seconds_left() == pytest.approx(995)


def test_the_bar_says_where_a_run_is_after_each_step(tmp_path):
    """On a terminal of eighty columns, with a period of log lines that never comes."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    options = [*SMALL, *sets(train__num_steps=30, train__log_every=1000), "--run-dir", "r"]
    env = {k: v for k, v in environment().items() if k not in ("COLUMNS", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", "train", *options],
        cwd=tmp_path,
        stdout=terminal,
        stderr=terminal,
        env={**env, "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while part := os.read(main, 65536):
            shown += part
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "\n").splitlines()
    bars = [line for line in lines if line.startswith("training") and "left" in line]
    assert any(
        re.search(r" \d+:\d\d left  step \d+/30  \d\.\d+ bits/dim  \d+ images/s", b) for b in bars
    )
    assert max(map(len, bars)) <= 80

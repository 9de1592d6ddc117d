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
from helpers import a_config

from flowtrain.checkpoints.description import Progress
from flowtrain.system.console import console
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.stop import Clock, signals


@pytest.mark.run
def test_a_terminal_shows_a_bar_and_saves_the_run_when_it_is_closed(tmp_path):
    """The bar needs no log lines. Output after the end of the terminal is no error."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", "train", *SMALL, "train.num_steps=9999"]
        + ["train.log_every=9999", "--run-dir", "r"],
        cwd=tmp_path,
        env={k: v for k, v in environment(TERM="xterm").items() if k != "COLUMNS"},
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    os.set_blocking(main, False)
    bar = r"training .* \d+:\d\d left  step \d+/9999  \d\.\d+ bits/dim  \d+ images/s"
    shown, bars = b"", []
    try:
        with within(60, "the bar") as expired:
            while not bars:
                expired()
                with contextlib.suppress(BlockingIOError):
                    shown += os.read(main, 65536)
                plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="ignore"))
                bars = [line for line in re.split(r"[\r\n]", plain) if re.search(bar, line)]
        os.close(main)
        assert process.wait(60) == 129
    finally:
        process.kill()
    assert max(map(len, bars)) <= 80 and summary(tmp_path / "r")["step"] > 0


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

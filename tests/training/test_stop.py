"""Signals that end a run."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

from catalogue import SMALL, sets
from cli_helpers import environment, summary, within

from flowtrain.training.stop import signals

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

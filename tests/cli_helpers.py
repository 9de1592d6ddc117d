"""Commands of flowtrain, each a process of its own, in a folder of the test's choice.

`flowtrain(...)` and `start(...)` are `python -m flowtrain`. `quick(...)` and `Forked(...)` fork a
process that has imported torch and flowtrain: a hundredth of the time. Both have their own exit
code, output files and signals.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import math
import multiprocessing.forkserver
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from catalogue import SHORT, WORDS
from forked_command import become_flowtrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.main import get_command

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.cli.main import app

COMMANDS = get_command(app)  # by name in `.commands`
SESSION = Path(os.environ["FLOWTRAIN_TESTS"])  # of all workers, made and removed by conftest.py
FOLDER = Path(tempfile.mkdtemp(dir=SESSION))  # what several tests of one worker share


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def ok(self) -> "Result":
        assert self.code == 0, self
        assert "Traceback" not in self.err + self.out
        return self

    def failed(self, code: int, *fragments: str) -> "Result":
        """It ended with this code and a message that has all the fragments, and no traceback."""
        assert "Traceback" not in self.err + self.out, self.err
        assert self.code == code, self
        said = " ".join(self.err.split())
        missing = [fragment for fragment in fragments if fragment not in said]
        assert not missing, f"{missing} not in {said}"
        return self


def environment(**extra: str) -> dict[str, str]:
    left_out = ("FLOWTRAIN", "FORCE_COLOR", "TTY_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    nowhere = dict.fromkeys(proxies, "http://127.0.0.1:9")
    plain = {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    return {**kept, **plain, **nowhere, "FLOWTRAIN_CACHE": str(FOLDER / "cache"), **extra}


def start(*args, cwd: Path, command=(sys.executable, "-m", "flowtrain"), **env: str):
    words = [*command, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=cwd, env=environment(**env), text=True, **pipes)
    atexit.register(process.kill)  # of a test that failed
    return process


def result(process: subprocess.Popen) -> Result:
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def flowtrain(*args, cwd: Path, **options) -> Result:
    return result(start(*args, cwd=cwd, **options))


class Forked:
    """A running command."""

    def __init__(self, args, cwd: Path, file_limit: int | None = None, first: str = "", **env: str):
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        context = _context()
        words = [str(arg) for arg in args]
        self.process = context.Process(
            target=become_flowtrain,
            args=(words, str(cwd), environment(**env), str(self.folder), file_limit, first),
        )
        # So that the child does not import pytest's main module.
        with mock.patch.dict(sys.modules["__main__"].__dict__, __spec__=None):
            self.process.start()
        # of a test that failed: otherwise pytest would wait for it at its end
        atexit.register(self.process.kill)

    @property
    def out(self) -> str:
        file = self.folder / "out"
        return file.read_text() if file.exists() else ""

    def result(self) -> Result:
        self.process.join(120)
        assert self.process.exitcode is not None, "it did not end"
        return Result(self.process.exitcode, self.out, (self.folder / "err").read_text())


def quick(*args, cwd: Path, **options) -> Result:
    return Forked(args, cwd, **options).result()


def torchrun_environment(count: int) -> list[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    of_all = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def begin(count, *args, cwd, cwds=None, **options) -> list[Forked]:
    """`count` processes of one command, with torchrun's environment and without torchrun."""
    places = zip(cwds or [cwd] * count, torchrun_environment(count), strict=True)
    return [Forked(args, folder, **options, **env) for folder, env in places]


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["before_the_fork"])
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    once = environment(PYTHONPATH=os.pathsep.join(paths))
    with mock.patch.dict(os.environ, once, clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def example(command: str, model: str = "nowhere.safetensors") -> list[str]:
    """The arguments of the first example in a command's help, where MODEL is `model`."""
    found = re.search(
        rf"\[cyan\]flowtrain {command} ?(.*?)\[/cyan\]", COMMANDS.commands[command].epilog
    )
    return re.sub(r"^(runs/)?\w+(?= |$)", model, found[1]).split()


def metrics(run: Path, timeless: bool = False) -> list[dict]:
    """The rows of metrics.jsonl; `timeless` without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second") if timeless else ()
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.safetensors"


def put_back(run: Path, step: int = 10) -> Path:
    """The run as a kill just after `step` would have left it, with longer logs."""
    last(run).unlink()
    last(run).hardlink_to(run / "checkpoints" / f"step-{step:08d}.safetensors")
    return run


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, their average, the optimizer's state, and the metrics."""
    a, b = checkpoint_format.read(last(one)), checkpoint_format.read(last(other))
    assert a.tensors.keys() == b.tensors.keys()
    assert any(name.startswith("optimizer.") for name in a.tensors)
    assert [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])] == []
    assert {**a.meta["progress"], "seconds": 0} == {**b.meta["progress"], "seconds": 0}
    assert metrics(one, timeless=True) == metrics(other, timeless=True)


def left_overs(run: Path) -> list[str]:
    return [str(path) for path in run.rglob("*") if ".tmp" in path.name]


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """For loops that wait: `with within(...) as expired: while not ...: expired()`."""
    end = time.monotonic() + seconds

    def check() -> None:
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.002)

    yield check


def wait_for_step(run: Path, step: int, process: subprocess.Popen | None = None) -> None:
    """Returns once a run has logged so many steps, in a minute, or as long as `process` lives."""
    file = run / "metrics.jsonl"
    with within(60 if process is None else math.inf, f"step {step} of {run}") as expired:
        while not file.exists() or file.read_text().count('"train"') < step:
            assert process is None or process.poll() is None, result(process)
            expired()


def report_of(program: Path, *words) -> dict:
    """The JSON that a program of `tests/adversarial` prints."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, program, *words],
        env=environment(PYTHONPATH=f"{tests}:{tests.parent}"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@functools.cache
def trained() -> dict[str, Path]:
    """Finished runs of each model on the digits, by the first worker; not to be written to."""
    with (SESSION / "lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        if not (SESSION / "glow").exists():
            for name in ("realnvp", "nice", "glow"):  # the last one is what others look for
                quick("train", *WORDS[name], *SHORT, "--run-dir", name, cwd=SESSION).ok()
    return {name: SESSION / name for name in WORDS}

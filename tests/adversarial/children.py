"""Commands of flowtrain in forks of this process, each with a limit of time and of memory.

This process has imported everything and computed nothing. So a command starts in a moment, and has
no threads to inherit.
"""

import importlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from flowtrain.cli.main import main as flowtrain

# Plain output, and a network that refuses at once.
ENVIRONMENT = {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
ENVIRONMENT |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    code: int  # the exit code, or minus the signal that ended the command
    out: str
    err: str
    seconds: float  # of computing, not of waiting for other processes
    peak: float  # MiB of memory at the peak, beyond what this process holds


def prepare() -> None:
    """Imports what commands import. To be called once, before `run`."""
    torch.set_num_threads(1)
    for name in ("before_the_fork", "constriction"):
        importlib.import_module(name)
    os.environ.update(ENVIRONMENT)


def run(
    words: list[str],
    folder: Path,
    seconds: int = 20,
    memory: int = 1024,
    before: Callable[[], object] = lambda: None,
) -> Outcome:
    """`flowtrain WORDS` in `folder`, after `before`, with `memory` MiB more than this process has.

    It is killed after `seconds` of computing, or after ten times as long if it waits.
    """
    files = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    for file in files:
        file.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    held = (resident - shared) * resource.getpagesize()  # a fork begins without pages of files
    child = os.fork()
    if child == 0:
        become(words, folder, files, seconds, memory, before)
    _, status, used = os.wait4(child, 0)
    out, err = (file.read_text(errors="replace") for file in files)
    code = os.waitstatus_to_exitcode(status)
    peak = (used.ru_maxrss * 1024 - held) / MIB
    return Outcome(code, out, err, used.ru_utime + used.ru_stime, peak)


def become(words, folder, files, seconds, memory, before=lambda: None) -> None:
    code = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(folder)
        os.environ["FLOWTRAIN_CACHE"] = str(folder / "cache")
        sys.argv = ["flowtrain", *words]
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory * MIB,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Their signals end the process.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(10 * seconds)
        before()
        try:
            flowtrain()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

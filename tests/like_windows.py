"""`python like_windows.py ARGS` is `python -m flowtrain ARGS` without modules and functions that
Windows lacks. Open files cannot be renamed or removed, and folders cannot be opened.
"""

import builtins
import fcntl
import os
import runpy
import signal
import sys
import types
from pathlib import Path

HIDDEN = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
MISSING = {
    os: "fchmod fork getuid killpg mkfifo O_DIRECTORY O_NOCTTY O_NONBLOCK pread sched_getaffinity "
    "statvfs uname",
    signal: "SIGALRM SIGHUP SIGKILL SIGUSR1",
}
find, open_descriptor = builtins.__import__, os.open


def opened(path, flags, mode=0o777):
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    return open_descriptor(path, flags, mode)


def without(module, names):
    kept = {key: value for key, value in vars(module).items() if key not in names.split()}
    copy = types.ModuleType(module.__name__)
    vars(copy).update(kept, open=opened if module is os else None)
    return copy


def imported(name, globals=None, *rest, **options):
    """`__import__`, in which the modules of flowtrain alone see less."""
    if (globals or {}).get("__name__", "").startswith("flowtrain"):
        if name in HIDDEN:
            raise ImportError(f"Windows has no {name}")
        if name in SEEN:
            return SEEN[name]
    return find(name, globals, *rest, **options)


def on_closed_files(function):
    """`function` of paths, which raises if this process has a file of theirs open."""

    def wrapped(*paths, **options):
        for number in Path("/dev/fd").iterdir():
            for path in map(Path, paths):
                try:
                    same = path.samefile(number)
                except OSError:
                    continue
                if same:
                    raise PermissionError(13, "The process cannot access the file", str(path))
        return function(*paths, **options)

    return wrapped


def locking(handle, mode, count):
    """`msvcrt.locking` of a byte that is in no file here, without waiting."""
    assert (mode, count) == (2, 1) and os.lseek(handle, 0, os.SEEK_CUR) > 2**20
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    SEEN = {module.__name__: without(module, names) for module, names in MISSING.items()}
    SEEN["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    builtins.__import__ = imported
    for name in ("link", "remove", "rename", "replace", "unlink"):
        setattr(os, name, on_closed_files(getattr(os, name)))
    sys.argv[0] = "flowtrain"
    runpy.run_module("flowtrain", run_name="__main__", alter_sys=True)

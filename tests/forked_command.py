"""What `cli_helpers.Forked` runs in a forked process."""

import multiprocessing
import os
import resource
import runpy
import sys
from pathlib import Path


def become_flowtrain(
    args: list[str], cwd: str, env: dict[str, str], folder: str, file_limit: int | None, first: str
) -> None:
    """`python -m flowtrain ARGS` in `cwd`, its output in `folder`/out and `folder`/err, after the
    Python of `first`.
    """
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # the platform's, for workers of its own
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["flowtrain", *args]
    exec(first, {})
    runpy.run_module("flowtrain", run_name="__main__", alter_sys=True)

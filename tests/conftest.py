"""The folder that all workers of a session share, and what a test leaves as it was."""

import gc
import logging
import os
import shutil
import signal
import tempfile

import pytest
import torch

# On tensors as small as the tests', more threads are ten times slower. Commands inherit it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))


@pytest.fixture(autouse=True)
def as_before():
    """Commands change the number of threads and the logger."""
    logger = logging.getLogger("flowtrain")
    before = logger.handlers, logger.propagate, logger.level
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run, in `runs/` of the current folder."""
    from cli_helpers import copy_of, trained

    return copy_of(trained()["glow"], tmp_path / "runs" / "glow_digits")


# Commands inherit it ignored if nohup has started the tests, and would then not stop at it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Makes the folder. Workers inherit its name in the environment; who made it removes it."""
    if "FLOWTRAIN_TESTS" not in os.environ:
        os.environ["FLOWTRAIN_TESTS"] = tempfile.mkdtemp(prefix="flowtrain-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("FLOWTRAIN_TESTS"), True))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Modules and tests live to the end: Python's collector need not look at them again."""
    gc.freeze()

"""The folder that all workers of a session share, and the marker `run`."""

import gc
import inspect
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch

HERE = str(Path(__file__).parent)

# On tensors as small as the tests', more threads are ten times slower. Commands inherit it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


# Commands inherit it ignored where nohup has started the tests, and would then not stop at it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Makes the folder. Workers inherit its name in the environment; who made it removes it."""
    if "FLOWTRAIN_TESTS" not in os.environ:
        os.environ["FLOWTRAIN_TESTS"] = tempfile.mkdtemp(prefix="flowtrain-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("FLOWTRAIN_TESTS"), True))


def pytest_collection_modifyitems(items):
    """Marks each test that runs a command or trains: itself, through a fixture, or a helper."""
    import cli_helpers  # not at the top: they need the folder

    from flowtrain.training import loop, step

    runs = [subprocess, cli_helpers.start, cli_helpers.Forked, loop.fit, step.train_step]
    known = {}  # function: whether it does
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        functions = [item.function, *(definition.func for [*_, definition] in fixtures)]
        if solves(item) or any(reaches(function, runs, known) for function in functions):
            item.add_marker("run")


def solves(item):
    """Is it about what solves an equation, with ten times the work of any other layer or model?"""
    values = item.callspec.params.values() if hasattr(item, "callspec") else []
    return any(isinstance(value, str) and value in ("cnf", "continuous") for value in values)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Modules and tests live to the end: Python's collector need not look at them again."""
    gc.freeze()


def reaches(function, targets, known):
    """Does the function, or one of the tests' that it names, name a target?"""
    if function not in known:
        known[function] = False  # for functions that name themselves
        codes = [function.__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        named = [
            inspect.unwrap(function.__globals__[name])  # of functools.cache, too
            for code in codes
            for name in code.co_names
            if name in function.__globals__
        ]
        known[function] = any(
            any(value is target for target in targets)
            or isinstance(value, FunctionType)
            and value.__code__.co_filename.startswith(HERE)
            and reaches(value, targets, known)
            for value in named
        )
    return known[function]

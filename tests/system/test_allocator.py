"""Freed memory that stays with the process."""

import subprocess
import sys
from unittest import mock

import pytest
from helpers import REPOSITORY

from flowtrain.system import allocator

FAULTS = """\
import ctypes, resource
from flowtrain.system.allocator import keep_freed_memory
import torch

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which need few faults

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20 // 4).add(1)  # two tensors of 16 MiB
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

{keep}; faults(); print(faults())
"""


@pytest.mark.run
def test_freed_memory_is_kept():
    if not hasattr(allocator.ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("this C library has no such setting")
    faults = {}
    for keep in ("keep_freed_memory()", "pass"):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        faults[keep] = float(subprocess.check_output(command, cwd=REPOSITORY))
    # of pages of 4 KiB there are 8192
    assert faults["keep_freed_memory()"] < 100 < 2000 < faults["pass"]


def test_other_and_older_c_libraries(monkeypatch):
    """Others are left alone. A threshold that is refused is lowered."""
    for missing in ("mallopt", "gnu_get_libc_version"):
        library = mock.Mock(["mallopt", "gnu_get_libc_version"])
        delattr(library, missing)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name, library=library: library)
        allocator.keep_freed_memory()
        assert not library.mock_calls
    library = mock.Mock()
    library.mallopt.side_effect = lambda key, value: int(key != -3 or value <= 32 * 2**20)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    allocator.keep_freed_memory()
    calls = [call.args for call in library.mallopt.mock_calls]
    assert calls == [(-3, 2**30), (-3, 32 * 2**20), (-1, -1)]

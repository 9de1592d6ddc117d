"""Freed memory that stays with the process."""

import subprocess
import sys

import pytest
from helpers import REPOSITORY

from flowtrain.system import allocator

FAULTS = """\
import resource
from flowtrain.system.allocator import keep_freed_memory
import torch

kept = {keep} and keep_freed_memory()
for _ in range(3):
    torch.ones(16 * 2**20 // 4).add(1)  # 16 MiB each
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * 2**20 // 4).add(1)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def faults(keep: bool) -> tuple[bool, float]:
    """Whether the C library agreed, and the page faults for 32 MiB of tensors."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    agreed, number = done.stdout.split()
    return agreed == "True", float(number)


def test_freed_memory_is_kept():
    agreed, number = faults(keep=True)
    if not agreed:
        pytest.skip("this C library has no such setting")
    assert number < 100 < 2000 < faults(keep=False)[1]  # of pages of 4 KiB there are 8192


@pytest.mark.parametrize("missing", ["mallopt", "gnu_get_libc_version"])
def test_other_c_libraries_are_left_alone(missing, monkeypatch):
    class Musl:
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return lambda *args: pytest.fail("it was called")

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Musl())
    assert allocator.keep_freed_memory() is False


def test_a_refused_threshold_is_lowered(monkeypatch):
    calls = []

    class OldGlibc:
        gnu_get_libc_version = None

        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return int(parameter != -3 or value <= 32 * 2**20)

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: OldGlibc())
    assert allocator.keep_freed_memory() is True
    assert calls == [(-3, 2**30), (-3, 32 * 2**20), (-1, -1)]

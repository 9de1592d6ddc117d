"""What a command imports: time is what a user waits for, but imports are what a test can count
on.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import SMALL, result, sets, start, trained
from helpers import REPOSITORY

from flowtrain.system import allocator

HEAVY = {
    "torch",
    "numpy",
    "sklearn",
    "scipy",
    "torchvision",
    "tensorboard",
    "PIL",
    "safetensors",
    "yaml",
}


def imported(*args, cwd) -> set[str]:
    """The modules that `python -m flowtrain ARGS` has imported, of the packages the first word of
    their names.
    """
    done = result(
        start(*args, cwd=cwd, command=(sys.executable, "-X", "importtime", "-m", "flowtrain"))
    )
    assert done.code == 0, done.err[-2000:]
    names = set(re.findall(r"^import time:.*\| +(\S+)$", done.err, re.MULTILINE))
    assert "flowtrain.cli.main" in names
    return names


def test_help_and_version_import_nothing_heavy(tmp_path):
    assert not imported("--help", cwd=tmp_path) & {*HEAVY, "pydantic", "flowtrain.config"}
    assert not imported("--version", cwd=tmp_path) & {
        *HEAVY,
        "pydantic",
        "rich",
        "flowtrain.config",
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "interpolate"])
def test_help_of_a_command_imports_nothing_heavy(command, tmp_path):
    # (pydantic is Typer's own choice, for options that have a type.)
    assert not imported(command, "--help", cwd=tmp_path) & {*HEAVY, "flowtrain.config"}


def test_training_imports_what_it_uses(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=pixels)
    options = [*SMALL, *sets(data__name="npz", data__path="data.npz", train__num_steps=1)]
    names = imported("train", *options, "--run-dir", "run", cwd=tmp_path)
    assert "torch" in names and (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert list((tmp_path / "run" / "samples").iterdir()), "no grid was drawn"
    assert not names & {"torchvision", "sklearn", "scipy", "matplotlib"}


def test_sampling_imports_what_it_uses(tmp_path):
    names = imported("sample", trained()["glow"], "--num", 4, "--out", "s.png", cwd=tmp_path)
    assert "torch" in names and (tmp_path / "s.png").exists()
    assert not names & {"torchvision", "sklearn", "scipy", "tensorboard", "matplotlib"}


def test_importing_the_package_is_light():
    code = (
        "import sys, flowtrain; assert not set(sys.modules) & {'torch', 'numpy', 'typer', "
        "'pydantic'}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- flowtrain/allocator.py -----------------------------------------------------------------------

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

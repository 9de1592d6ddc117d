"""The command that installs an optional package."""

import importlib.util
import shlex
import subprocess
import sys

import pytest
from helpers import REPOSITORY

from flowtrain.system import packages


def an_environment(folder, monkeypatch, python="python"):
    """Makes a folder with a `pip` the first of the path. The process runs its `python`."""
    folder.mkdir()
    (folder / "pip").touch(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / python))


@pytest.mark.parametrize(
    "python, expected",
    [
        ("python", "pip install constriction"),
        # pip belongs to another Python.
        ("../other/python", "{}/bin/../other/python -m pip install constriction"),
        ("../a b/python", "'{}/bin/../a b/python' -m pip install constriction"),
    ],
)
def test_it_installs_for_this_python(python, expected, tmp_path, monkeypatch):
    an_environment(tmp_path / "bin", monkeypatch, python)
    assert packages.install_command("constriction") == expected.format(tmp_path)


def test_without_pip(tmp_path, monkeypatch):
    an_environment(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = f"uv pip install --python {tmp_path}/bin/python constriction"
    assert packages.install_command("constriction") == expected


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here")
def test_the_command_works(tmp_path):
    """For a package that is there, so nothing is installed. pip shortens paths below its folder."""
    words = shlex.split(packages.install_command("pytest"))
    done = subprocess.run(
        [*words, "--no-index"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert f"pytest in {sys.prefix}" in done.stdout


def test_no_text_names_an_extra_of_a_package_that_no_index_has():
    """`pip install flowtrain[...]` fails as long as flowtrain is on no index."""
    files = [*REPOSITORY.glob("*.md")]
    for folder in ("flowtrain", "docs", "benchmarks"):
        files += [
            path for suffix in ("py", "md") for path in (REPOSITORY / folder).rglob(f"*.{suffix}")
        ]
    assert len(files) > 150
    wrong = [str(path) for path in files if "flowtrain[" in path.read_text()]
    assert wrong == []

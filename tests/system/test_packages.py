"""The command that installs an optional package."""

import importlib.util
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


def test_no_text_names_an_extra_of_a_package_that_no_index_has():
    """`pip install flowtrain[...]` fails as long as flowtrain is on no index."""
    files = [*REPOSITORY.glob("*.md")]
    for folder in ("flowtrain", "docs", "benchmarks"):
        files += [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("*.md")]
    assert len(files) > 150
    assert [str(path) for path in files if "flowtrain[" in path.read_text()] == []

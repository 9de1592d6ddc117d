"""The command that installs an optional package."""

import importlib.util
import sys

import pytest
from helpers import REPOSITORY

from flowtrain.system import packages


@pytest.mark.parametrize(
    "python, pip, expected",
    [
        ("python", True, "pip install constriction"),
        # The first pip of the path belongs to another Python.
        ("../other/python", True, "{}/bin/../other/python -m pip install constriction"),
        ("../a b/python", True, "'{}/bin/../a b/python' -m pip install constriction"),
        ("python", False, "uv pip install --python {}/bin/python constriction"),
    ],
)
def test_it_installs_for_this_python(python, pip, expected, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / python))
    if not pip:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert packages.install_command("constriction") == expected.format(tmp_path)


def test_no_text_names_an_extra_of_a_package_that_no_index_has():
    """`pip install flowtrain[...]` fails as long as flowtrain is on no index."""
    files = [*REPOSITORY.glob("*.md")]
    for folder in ("flowtrain", "docs", "benchmarks"):
        files += [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("*.md")]
    assert len(files) > 150
    assert [str(path) for path in files if "flowtrain[" in path.read_text()] == []

"""The command that installs the packages of an extra."""

import importlib.util
import re
import sys
import tomllib

import pytest
from helpers import REPOSITORY

from flowtrain.system import packages


@pytest.mark.parametrize(
    "python, pip, expected",
    [
        ("python", True, "pip install"),
        # The first pip of the path belongs to another Python.
        ("../other/python", True, "{}/bin/../other/python -m pip install"),
        ("../a b/python", True, "'{}/bin/../a b/python' -m pip install"),
        ("python", False, "uv pip install --python {}/bin/python"),
    ],
)
def test_it_installs_for_this_python(python, pip, expected, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / python))
    if not pip:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = expected.format(tmp_path)
    whole = f"{command} 'flowtrain[jxl]', or from a checkout {command} '.[jxl]'"
    assert packages.install_command("jxl") == whole


def test_named_extras_exist():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    files = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    files += (REPOSITORY / "flowtrain").rglob("*.py")
    pattern = r"""(?<!Dict\()extra="(\w+)"|install '\.\[([\w,]+)\]'"""
    found = re.findall(pattern, "".join(path.read_text() for path in files))
    named = {extra for pair in found for words in pair for extra in words.split(",") if extra}
    assert {"explore", "jxl", "hub"} <= named <= project["optional-dependencies"].keys()

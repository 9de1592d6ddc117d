"""The list of commands."""

import importlib
import os
import pkgutil
import subprocess
import sys

from cli_helpers import environment
from helpers import REPOSITORY

import flowtrain.cli
from flowtrain.cli.main import app


def test_every_command_is_listed_and_documented():
    """A module of flowtrain.cli with a function of its own name is a command."""
    names = {info.name for info in pkgutil.iter_modules(flowtrain.cli.__path__)} - {"main"}
    modules = {name: importlib.import_module(f"flowtrain.cli.{name}") for name in names}
    commands = {name for name, module in modules.items() if hasattr(module, name)}
    assert commands <= {command.callback.__name__ for command in app.registered_commands}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {name for name in named if f"flowtrain {name} " not in readme} == set()


def test_files_are_written_although_nobody_reads_what_is_printed(tmp_path):
    read, write = os.pipe()
    os.close(read)
    options = ["--num-images", "4", "--json", "p.json", "--scores", "p.csv"]
    words = [sys.executable, "-m", "flowtrain", "evaluate", "glow_digits", *options]
    found = subprocess.run(
        words, cwd=tmp_path, env=environment(), stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.csv"}


def test_the_readme_is_short():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and [line for line in lines if len(line) > 100] == []

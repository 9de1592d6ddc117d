"""The list of commands."""

import importlib
import pkgutil

from helpers import REPOSITORY

import flowtrain.cli
from flowtrain.cli.main import app


def test_every_command_is_listed_and_documented():
    """A module of flowtrain.cli with a function of its own name is a command."""
    names = {info.name for info in pkgutil.iter_modules(flowtrain.cli.__path__)} - {"main"}
    modules = {name: importlib.import_module(f"flowtrain.cli.{name}") for name in names}
    commands = {name for name, module in modules.items() if hasattr(module, name)}
    assert commands == {command.callback.__name__ for command in app.registered_commands}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {name for name in named if f"flowtrain {name} " not in readme} == set()


def test_the_readme_is_short():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and [line for line in lines if len(line) > 100] == []

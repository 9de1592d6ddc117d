"""The list of commands."""

import os
import subprocess
import sys

import pytest
from cli_helpers import COMMANDS, environment
from helpers import REPOSITORY

from flowtrain.cli import main


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_every_command_is_documented(name):
    assert "flowtrain" in str(COMMANDS.commands[name].epilog), "its help has no example"
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert f"flowtrain {name} " in text, f"no page shows `flowtrain {name} ...`"


def test_the_help_has_panels():
    panels = [each.rich_help_panel for each in main.app.registered_commands]
    assert list(dict.fromkeys(panels)) == main.PANELS


@pytest.mark.run
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

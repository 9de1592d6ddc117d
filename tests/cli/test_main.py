"""The list of commands."""

import os
import subprocess
import sys

import pytest
from cli_helpers import COMMANDS, environment, flowtrain
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


OPTIONS = ["--num-images", "4", "--json", "p.json", "--scores", "p.csv"]


@pytest.mark.run
@pytest.mark.parametrize(
    "words, encoding, files",
    [
        (["list"], "ascii", set()),
        (["evaluate", "glow_digits", *OPTIONS], "utf-8", {"p.json", "p.csv"}),
    ],
)
def test_files_are_written_although_nobody_reads_what_is_printed(words, encoding, files, tmp_path):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "flowtrain", *words]
    env = environment(PYTHONIOENCODING=encoding)
    pipes = {"stdout": write, "stderr": subprocess.PIPE}
    found = subprocess.run(words, cwd=tmp_path, env=env, check=False, **pipes)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.run
@pytest.mark.parametrize("word, code", [("list", 0), ("nothing", 2)])
def test_standard_streams_that_were_closed_before(word, code, tmp_path):
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "flowtrain"]
    assert flowtrain(word, cwd=tmp_path, command=shell).code == code


@pytest.mark.run
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    code = "import os, sys, flowtrain.cli.main as cli\nsys.argv[1:] = ['--version']\n"
    code += "try: cli.main()\nexcept SystemExit: sys.exit(os.open(os.devnull, os.O_RDONLY))"
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable]
    assert flowtrain("-c", code, cwd=tmp_path, command=shell).code >= 3

"""The examples in the README run from top to bottom, in one folder. `pytest -s` prints times."""

import re
import shlex
import shutil
import time

import pytest
from cli_helpers import flowtrain, start
from helpers import REPOSITORY


@pytest.mark.slow
def test_the_examples_run_from_top_to_bottom(tmp_path):
    pytest.importorskip("constriction")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    story = readme.partition("## By example")[2].partition("\n## ")[0]
    commands = re.findall(r"^    flowtrain (.+)$", story, re.MULTILINE)
    assert len(commands) > 20
    (tmp_path / "docs").mkdir()
    shutil.copy(REPOSITORY / "docs" / "holes.png", tmp_path / "docs")
    for line in commands:
        words, started = shlex.split(line, comments=True), time.monotonic()
        if words[0] != "explore":
            flowtrain(*words, cwd=tmp_path).ok()
            print(f"{time.monotonic() - started:6.1f} s  flowtrain {line}")
            continue
        process = start(*words, "--no-browser", cwd=tmp_path)  # until its page is there
        printed = [process.stdout.readline() for _ in range(2)]
        process.kill()
        assert "http://" in "".join(printed)

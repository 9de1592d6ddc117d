"""A kill at any file operation of a run loses nothing (kills.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import environment

HERE = Path(__file__).parent


def kills(folder, *points):
    """The result of kills.py."""
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", folder, *points],
        env=environment(PYTHONPATH=f"{HERE.parent}:{HERE.parents[1]}"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_some_kills_lose_nothing(tmp_path):
    result = kills(tmp_path / "k", "12")
    assert result["losses"] == [] and result["kills"] == 12 and result["operations"] > 100


@pytest.mark.fuzz
def test_no_kill_loses_anything(tmp_path):
    result = kills(tmp_path / "k", "all")
    print(f"{result['kills']} runs killed at {result['operations']} file operations")
    assert result["losses"] == []

"""A kill at any file operation of a run loses nothing (kills.py)."""

from pathlib import Path

import pytest
from cli_helpers import report_of

pytestmark = pytest.mark.run

KILLS = Path(__file__).with_name("kills.py")


def test_some_kills_lose_nothing(tmp_path):
    result = report_of(KILLS, tmp_path / "k", "12")
    assert result["losses"] == [] and result["kills"] == 12 and result["operations"] > 100


@pytest.mark.fuzz
def test_no_kill_loses_anything(tmp_path):
    result = report_of(KILLS, tmp_path / "k", "all")
    print(f"{result['kills']} runs killed at {result['operations']} file operations")
    assert result["losses"] == []

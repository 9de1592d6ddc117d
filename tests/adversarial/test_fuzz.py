"""Damaged and crafted files (fuzz.py), and small files that take much (bombs.py)."""

import random
from pathlib import Path

import pytest
from cli_helpers import report_of

pytestmark = pytest.mark.run

HERE = Path(__file__).parent
AGAIN = "PYTHONPATH=tests python tests/adversarial/fuzz.py --only CASE runs one case again"


def test_some_damaged_files_do_no_harm():
    result = report_of(HERE / "fuzz.py", "--cases", "40")
    assert result["faults"] == {}, AGAIN
    assert all(each["tried"] for each in result["formats"].values())
    assert sum(each.get("refused", 0) for each in result["formats"].values()) > 5


@pytest.mark.fuzz
def test_no_damaged_file_does_harm():
    seed = random.randrange(10**6)
    print(f"\nfuzz.py --cases 10000 --first {seed}")
    result = report_of(HERE / "fuzz.py", "--cases", "10000", "--first", str(seed))
    print(*result["formats"].items(), sep="\n")
    assert result["faults"] == {}, AGAIN


@pytest.mark.fuzz
def test_no_small_file_takes_much():
    result = report_of(HERE / "bombs.py")
    print(*result["rows"], sep="\n")
    assert result["faults"] == []

"""CONTRIBUTING.md names files and tests that exist."""

import re

from helpers import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_its_tests_exist():
    files = (REPOSITORY / "tests").rglob("test_*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 5
    assert named - set(re.findall(r"^def (test_\w+)", code, re.MULTILINE)) == set()


def test_its_files_exist():
    named = re.findall(r"`((?:configs|docs|flowtrain|tests)/[\w/.]*)`", TEXT)
    assert len(named) > 5
    assert [path for path in named if not (REPOSITORY / path).exists()] == []

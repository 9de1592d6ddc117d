"""CONTRIBUTING.md and docs/reliability.md name files and tests that exist; each tool has a page."""

import re
import tomllib

from helpers import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_its_tests_exist():
    files = (REPOSITORY / "tests").rglob("test_*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    gone = named - set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    assert len(named) > 5 and gone == set(), "CONTRIBUTING.md names tests that do not exist"


def test_its_files_exist():
    named = re.findall(r"`((?:configs|docs|flowtrain|tests)/[\w/.]*)`", TEXT)
    gone = [path for path in named if not (REPOSITORY / path).exists()]
    assert len(named) > 5 and gone == [], "CONTRIBUTING.md names files that do not exist"


def test_the_tests_of_reliability_exist():
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", text))
    gone = [path for path in named if not (REPOSITORY / "tests" / path).exists()]
    assert len(named) > 15 and gone == [], "docs/reliability.md names tests that do not exist"


def test_every_tool_has_a_page_and_tests():
    for command in (REPOSITORY / "flowtrain" / "tools").glob("*/command.py"):
        tool = command.parent.name
        assert (REPOSITORY / "docs" / f"{tool}.md").exists(), f"docs/{tool}.md is missing"
        assert (REPOSITORY / "tests" / "tools" / tool).is_dir(), f"tests/tools/{tool}/ is missing"


def test_the_source_distribution_leaves_nothing_out():
    """hatchling takes all that git does not ignore, unless a list says otherwise."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"].keys() == {"wheel"}

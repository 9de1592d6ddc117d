"""Errors: exit codes, values in messages, and suggestions."""

import errno

import pytest
from helpers import memory_below

from flowtrain.errors import RunError, cut, did_you_mean, exit_code, short, shown


def test_exit_codes():
    assert exit_code(KeyboardInterrupt()) == 130 and exit_code(SystemExit(3)) == 3
    assert exit_code(OSError(errno.ENOSPC, "full")) == 1 == exit_code(RunError("it failed"))
    assert exit_code(FileNotFoundError(errno.ENOENT, "no such file")) == 2


def test_did_you_mean():
    assert did_you_mean("train.lrr", ["train.lr", "seed"]) == "; did you mean train.lr?"
    assert did_you_mean("zzz", ["train.lr", "seed"]) == ""


def test_text_is_cut_to_one_printable_line():
    assert cut("a\n  b") == "a b"
    assert cut("x" * 100) == "x" * 100 and cut("x" * 101) == "x" * 97 + "..."
    assert cut("\x1b[31m\udcff") == "?[31m?"
    assert short(ValueError("a\nb")) == "a b" and short(ValueError()) == "ValueError"
    assert len(short(ValueError("x" * 1000))) == 300


BOMB: list[object] = [1] * 10
for _ in range(30):
    BOMB = [BOMB] * 10
DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]
ITSELF: list[object] = []
ITSELF.append(ITSELF)


VALUES = {
    "text": ("wide", "'wide'"),
    "dict": ({"x": 3}, "{'x': 3}"),
    "bomb": (BOMB, None),
    "deep": (DEEP, "[[[[...]]]]"),
    "itself": (ITSELF, None),
    "digits": (10**5000, "a number that is too long to show"),
    "long text": ("x" * 10**6, None),
    "long keys": ({"x" * 1000: {"y" * 1000: "z" * 1000}}, None),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_shown_in_few_characters(name):
    value, text = VALUES[name]
    with memory_below(1e6):
        found = shown(value)
    assert len(found) <= 100 and found == (text or found)

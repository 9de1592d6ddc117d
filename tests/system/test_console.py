"""How numbers are said."""

from flowtrain.system.console import counted


def test_one_thing_and_many():
    assert [counted(n, "sample") for n in (0, 1, 12)] == ["0 samples", "1 sample", "12 samples"]

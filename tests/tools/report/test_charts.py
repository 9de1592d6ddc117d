"""The curves that `compare` draws."""

import warnings

import pytest
from matplotlib.figure import Figure
from run_files import ROWS, train_row, validation_row

from flowtrain.results import Row
from flowtrain.tools.report import charts


def drawn(runs, key):
    axes = Figure().subplots()
    charts._losses(axes, runs, key, "bits/dim")
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()]
    return lines, axes


def test_curves_are_the_rows():
    rows = [Row(**row) for row in [*ROWS, validation_row(5, None)]]
    lines, axes = drawn({"a": rows, "b": rows[:1]}, "images")
    assert lines == [([10, 20, 40], [5, 4, 3]), ([20, 40], [4.2, 3.125]), ([10], [5]), ([], [])]
    assert axes.get_xlabel() == "images" and axes.get_ylabel() == "bits/dim"
    lines, axes = drawn({"a": rows}, "seconds")
    assert lines[1] == ([5, 9], [4.2, 3.125]) and axes.get_xlabel() == "seconds"


@pytest.mark.parametrize(
    "seconds, unit, shown", [(100, "seconds", 100), (600, "minutes", 10), (36000, "hours", 10)]
)
def test_time_is_in_a_unit_that_fits(seconds, unit, shown):
    lines, axes = drawn({"a": [Row(**train_row(1, 3.0, seconds=seconds))]}, "seconds")
    assert lines[0][0] == [shown] and axes.get_xlabel() == unit


def test_the_steep_start_does_not_flatten_the_rest():
    rows = [Row(**train_row(step, 3 + 100 / step**2)) for step in range(1, 101)]
    low, high = drawn({"a": rows}, "images")[1].get_ylim()
    assert low < 3.01 and 7 < high < 8  # the value at step 5 is 7


def test_twelve_runs_all_look_different():
    rows = [Row(**row) for row in ROWS]
    lines = drawn({str(i): rows for i in range(12)}, "images")[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


@pytest.mark.run  # takes long
@pytest.mark.parametrize("name", ["_hidden", "$x_{$", "a$b$", "\udcff"])
def test_any_name_is_in_the_legend(name):
    rows = [Row(**row) for row in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = [charts.losses_png({each: rows}, "nats") for each in (name, name + "b")]
    assert pictures[0] != pictures[1]

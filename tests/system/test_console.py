"""Progress without a live bar, and text that is printed as it is."""

from types import SimpleNamespace

from rich.table import Table

from flowtrain.system import console
from flowtrain.system.console import ProgressBar


def test_lines_of_progress_come_by_the_clock(monkeypatch, capsys):
    now = iter([0, 1, 3, 3, 12, 14, 14, 15, 25.5, 25.5, 40])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with ProgressBar("training", first_line=2) as bar:
        bar(1, 100)  # at 1 s: too early
        bar(0, 100)  # at 3 s, and the next line from 13 s on
        bar(12, 100)
        bar(14, 100, "step 14")
        bar.wait()  # at 15 s: a line of another kind
        bar(25.5, 100)
        bar(100, 100)  # the end has a message of its own
    lines = ["training: 0 of 100", "training: step 14", "training: 25.5 of 100, 1:14 left"]
    assert capsys.readouterr().out.splitlines() == lines


def test_text_is_printed_as_it_is(capsys):
    console.console.print("wrote runs/a:b:c/[red]d.png")
    assert capsys.readouterr().out == "wrote runs/a:b:c/[red]d.png\n"


def test_no_text_controls_the_terminal(capsys):
    table = Table.grid()
    table.add_row("\x1b[2J\x9b\x07\r")
    console.console.print("glow\x1b[31m", table)
    assert capsys.readouterr().out == "glow?[31m\n?[2J???\n"

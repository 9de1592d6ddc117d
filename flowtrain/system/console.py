"""What commands print: live bars on a terminal, plain lines elsewhere."""

import time
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from flowtrain.system.files import PerhapsUnread


class _Output(Console):
    outlives_terminal = False

    @property
    def file(self) -> IO[str]:
        stream = super().file
        return cast(IO[str], PerhapsUnread(stream)) if self.outlives_terminal else stream

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream


console = _Output(highlight=False, markup=False, soft_wrap=True)


def outlive_the_terminal() -> None:
    """From now on, printing to a closed terminal or pipe is no error."""
    console.outlives_terminal = True


def duration(seconds: float) -> str:
    """Formats seconds: 75 as `1:15`, 4000 as `1:06:40`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figure(
    value: float | None, error: float | None = None, form: str = ".3f", missing: str = "not finite"
) -> str:
    """Formats a figure with its standard error, which a single image does not have."""
    if value is None:
        return missing
    return f"{value:{form}}" + ("" if error is None else f" +- {error:{form}}")


def counted(count: int, what: str) -> str:
    """A number of things whose plural ends in s: `1 sample`, `12 samples`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def silent(done: float, total: float) -> None:
    """Progress that nobody sees."""


WIDE = 110  # columns of a terminal that has room for a long bar


class ProgressBar:
    """Progress of a long job: a live bar on a terminal, and elsewhere a line now and then.

    Call it with the amount done and the total. `text` is shown behind the bar, by default the time
    that is left.
    """

    def __init__(self, title: str, seconds_between_lines: float = 10.0):
        self.title = title
        self.seconds_between_lines = seconds_between_lines
        self.started = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(40 if console.width >= WIDE else 8),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=None, text="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: float, total: float, text: str = "") -> None:
        now = time.monotonic()
        left = f"{duration((now - self.started) / max(done, 1e-9) * (total - done))} left"
        self.bar.update(self.task, completed=done, total=total, text=text or (left if done else ""))
        if (
            not console.is_terminal
            and done < total
            and now - self.last_line > self.seconds_between_lines
        ):
            self.last_line = now
            console.print(f"{self.title}: {done:g} of {total:g}, {left}")

"""What commands print: live bars on a terminal, plain lines elsewhere."""

import time
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from flowtrain.system.files import PerhapsUnread

# Text from outside, such as the name of a model, must not move the cursor or change colours.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - set(b"\t\n"), "?")


class _Output(Console):
    outlives_terminal = False  # whether printing to a closed terminal or pipe is no error

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(CONTROLS), **options)

    @property
    def file(self) -> IO[str]:
        stream = super().file
        return cast(IO[str], PerhapsUnread(stream)) if self.outlives_terminal else stream

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream


console = _Output(highlight=False, markup=False, emoji=False, soft_wrap=True)


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


SECONDS_BETWEEN_LINES = 10.0  # of progress, if there is no live bar
WIDE = 110  # columns of a terminal that has room for a long bar


class ProgressBar:
    """Progress of a long job: a live bar on a terminal, and elsewhere a line now and then.

    Call it with the amount done and the total. `text` is shown behind the bar, by default the time
    that is left. The first line comes after `first_line` seconds.
    """

    def __init__(self, title: str, first_line: float = SECONDS_BETWEEN_LINES):
        self.title = title
        self.started = time.monotonic()
        self.next_line = self.started + first_line
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
        now, left = time.monotonic(), ""
        if done:
            left = f"{duration((now - self.started) / done * (total - done))} left"
        if console.is_terminal:
            self.bar.update(self.task, completed=done, total=total, text=text or left)
        elif done < total and now > self.next_line:
            self.wait()
            amount = ", ".join(filter(None, (f"{done:g} of {total:g}", left)))
            console.print(f"{self.title}: {text or amount}")

    def wait(self) -> None:
        """Call it after a line of another kind, so the next one of this comes later."""
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES

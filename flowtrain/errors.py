"""The errors that end a command early, with their exit codes."""

import difflib
import errno
import reprlib
import signal
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """The user's input is wrong: a configuration, path, option, data set or checkpoint.

    The exit code is 2.
    """

    exit_code = 2


class RunError(Exception):
    """A command failed while running: a non-finite likelihood, a full disk. The exit code is 1."""

    exit_code = 1


class Interrupted(Exception):
    """A signal stopped training, which was saved. The exit code is 128 plus the signal number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class EndedElsewhere(Exception):
    """Another process of the same run has failed with this exit code, and printed why."""

    def __init__(self, exit_code: int):
        super().__init__(f"another process failed with exit code {exit_code}")
        self.exit_code = exit_code


def exit_code(error: BaseException) -> int:
    """The exit code of a command that an error ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, OSError):
        return RunError.exit_code if is_disk_full(error) else UserError.exit_code
    return getattr(error, "exit_code", RunError.exit_code)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is about space on the disk."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(folder: Path | str, error: BaseException) -> RunError:
    """The error to raise where `is_disk_full`."""
    return RunError(f"cannot write to {folder} ({short(error)}): make room and run again")


_PACKAGES = ("site-packages", "dist-packages")


def place(error: BaseException) -> str:
    """` (FILE, line N)` for the last line of the user's own code that ran before an error, or an
    empty string. Code of flowtrain, of Python and of installed packages is not the user's.
    """
    found, others = "", (Path(__file__).parent, Path(sysconfig.get_path("stdlib")))
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        ours = any(file.is_relative_to(folder) for folder in others)
        if file.is_absolute() and not ours and not any(name in file.parts for name in _PACKAGES):
            found = f" ({file}, line {line})"
    return found


def raised(error: BaseException) -> str:
    """An error of the user's own code as one line for a message, with its `place`."""
    return f"{type(error).__name__}: {short(error)}{place(error)}"


def short(error: BaseException, limit: int = 300) -> str:
    """An exception as one line for a message."""
    return cut(str(error), limit) or type(error).__name__


def cut(text: str, limit: int = 100) -> str:
    """Text from outside as one printable line of at most `limit` characters, for a message."""
    text = " ".join(text[: 2 * limit + 2].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 3
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = 80


def shown(value: object) -> str:
    """The `repr` of a value from outside, in at most 100 characters, however large it is."""
    try:
        return cut(_BOUNDED.repr(value))
    except ValueError:  # Python writes out no number of more than 4,300 digits.
        return "a number that is too long to show"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean WORD?` with the most similar word, or an empty string."""
    words = list(words)
    # A key in the wrong section is as common a mistake as a misspelt one.
    close = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2]]
    if len(close) != 1:
        lower = {w.lower(): w for w in words}
        found = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
        close = [lower[w] for w in found]
    return f"; did you mean {close[0]}?" if close else ""

"""The trials of a sweep: a row with a seed each, in a run directory of its own.

All state is in files, so any number of processes on any machines may work on one directory. A
trial belongs to the process that has locked its file `.claim`. Its commands inherit the open
file, so the lock outlasts a kill of the sweep while they go on, and no longer.
"""

import contextlib
import csv
import functools
import io
import json
import math
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from pydantic import model_validator

from flowtrain.checkpoints import record
from flowtrain.checkpoints.format import SUFFIX
from flowtrain.errors import Interrupted, cut
from flowtrain.results import File
from flowtrain.system import files

Call = Callable[[Sequence[str], BinaryIO], int]  # words of a command, its output, its exit code
LONGEST_FILE = 2**28  # bytes of a log, or of numbers for each validation image
# By the exit code of a command: the signal that stopped it, after it had saved or at once.
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
STOPPED = {code: s for s in SIGNALS for code in (128 + s, -s)}


class Result(File):
    """`rung-N.json`: a trial at the end of a rung, or why it ended early, if it has a `message`.
    Without the file, the rung is tried again.
    """

    message: str | None = None
    step: int = 0
    images: int = 0  # seen in training
    seconds: float = 0.0  # by `train.clock`
    parameters: int = 0
    unit: str = ""
    losses: list[float] = []  # of the validation images, in `unit`

    @model_validator(mode="after")
    def _require_losses(self) -> Self:
        if self.message is None and not self.losses:
            raise ValueError("neither losses nor a message")
        return self

    @property
    def loss(self) -> float:
        """The mean loss; infinite if the trial ended early."""
        return statistics.fmean(self.losses) if self.message is None else math.inf


@functools.cache
def _read(file: Path) -> Result:
    """A result, which is written once. Raises `UserError` if it is damaged."""
    return record.checked(Result, _text(file), str(file))


def _text(file: Path, start: int = 0) -> str:
    return files.read_regular(file, LONGEST_FILE)[start:].decode(errors="replace")


@dataclass(frozen=True)
class Trial:
    """A row with a seed, and its run directory."""

    row: int
    seed: int
    path: Path

    def result(self, rung: int) -> Result | None:
        """The result of a rung, or None so far."""
        file = self.path / f"rung-{rung}.json"
        return _read(file) if file.exists() else None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[int | None]:
        """An open file with the lock of the trial, or None if another process has it."""
        files.make_folder_of(self.path / ".claim")
        with files.append_regular(self.path / ".claim") as file:
            try:
                files.lock(file.fileno(), wait=False)
            except BlockingIOError:
                yield None
                return
            yield file.fileno()

    def run(self, rung: int, train: Sequence[str], call: Call) -> Result:
        """Trains to the end of a rung by `call`, with the words `train` of `flowtrain train`
        without the run directory, evaluates, and writes the result. Raises `Interrupted` if a
        signal stopped a command.
        """
        result = self._measured(train, call)
        data = json.dumps(result.content()).encode()
        files.write_atomically(self.path / f"rung-{rung}.json", data + b"\n")
        return result

    def _measured(self, train: Sequence[str], call: Call) -> Result:
        last = self.path / "checkpoints" / f"last{SUFFIX}"
        evaluation, scores = (self.path / f"validation.{kind}" for kind in ("json", "csv"))
        outputs = ["--json", str(evaluation), "--scores", str(scores)]
        for words in (
            ["train", *train, "--run-dir", str(self.path)],
            ["evaluate", str(last), "--split", "validation", "--trust-code", *outputs],
        ):
            with files.append_regular(self.path / "log.txt") as log:
                before = log.tell()
                code = call(words, log)
            if code in STOPPED:
                raise Interrupted(STOPPED[code])
            if code:
                return Result(message=_message(code, _text(self.path / "log.txt", before)))
        summary = record.read_summary(self.path / "summary.json")
        dims = record.read_evaluation(evaluation).dims or 1
        nats = {"bits/dim": dims * math.log(2), "nats/dim": dims}.get(summary.unit, 1)
        rows = csv.DictReader(io.StringIO(_text(scores)))
        return Result(
            step=summary.step,
            images=summary.images,
            seconds=summary.seconds,
            parameters=summary.parameters,
            unit=summary.unit,
            losses=[-float(each["log_prob"]) / nats for each in rows],
        )


def _message(code: int, output: str) -> str:
    """The reason of a command that failed: its signal, its message, or its last line or code."""
    if code < 0:
        of_memory = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{of_memory}"
    _, *messages = re.split(r"^flowtrain: ", output, flags=re.MULTILINE)
    last = messages[-1] if messages else output.rstrip().rpartition("\n")[2]
    return cut(last or f"exit code {code}", 300)

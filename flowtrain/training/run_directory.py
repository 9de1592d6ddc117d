"""The run directory while a run writes it: its files, its lock, and cutting back on resume."""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.format import SUFFIX
from flowtrain.config import Config
from flowtrain.errors import RunError, UserError, is_disk_full
from flowtrain.results import Row
from flowtrain.system import distributed
from flowtrain.system.files import write_atomically


class RunDirectory:
    """Paths and files under `RUN`. The README says what each holds.

    If there are several processes, only process 0 writes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.last = self.checkpoints / f"last{SUFFIX}"
        self.best = self.checkpoints / f"best{SUFFIX}"
        self.metrics = path / "metrics.jsonl"
        self._writer: SummaryWriter | None = None

    def holds_a_run(self) -> bool:
        return (self.path / "config.yaml").exists() or self.last.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out. The lock ends with the process, however that ends.

        Raises:
            UserError: if the directory is locked or cannot be used.
            RunError: if a file cannot be written later, for example because the disk is full.
        """
        if not distributed.is_main():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("ab+", buffering=0)
        except OSError as error:
            kind = RunError if is_disk_full(error) else UserError
            raise kind(
                f"--run-dir {self.path}: cannot be used: {error.strerror or error}"
            ) from error
        with file:
            try:
                # Not flock: processes that a killed trainer had started would keep holding that.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().decode().strip() or "unknown"
                raise UserError(
                    f"--run-dir {self.path}: in use by another process (pid {owner}); "
                    "wait for it, stop it, or choose another directory"
                ) from error
            try:
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                with _failing_quietly():
                    try:
                        yield
                    finally:
                        self.close()
            except OSError as error:
                raise RunError(
                    f"{error.filename or self.path}: cannot be written: {error.strerror or error}; "
                    f"what was saved before in {self.path} is kept"
                ) from error

    @distributed.main_only
    def begin(self, config: Config) -> None:
        """Writes the resolved configuration, and removes files that a killed process left half
        written.
        """
        for folder in (self.path, self.checkpoints, self.samples):
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise UserError(
                    f"--run-dir {self.path}: {folder} is not a folder; remove it"
                ) from error
            for left_over in folder.glob(".*.tmp"):
                left_over.unlink()
        write_atomically(self.path / "config.yaml", config.yaml().encode())

    @distributed.main_only
    def cut_back(self, step: int, config: Config) -> None:
        """Removes what was logged after `step` from `metrics.jsonl`, and marks it as purged in
        TensorBoard.
        """
        self.close()
        if self.metrics.exists():
            kept = [row for row in _rows(self.metrics) if row["step"] <= step]
            write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._writer = SummaryWriter(str(self.path), purge_step=step + 1)
        self._writer.add_text("configuration", f"```yaml\n{config.yaml()}```", step)

    @property
    def tensorboard(self) -> SummaryWriter:
        assert self._writer is not None, "cut_back comes first"
        return self._writer

    @distributed.main_only
    def log(self, row: Row) -> None:
        """Writes a line of `metrics.jsonl`, flushed, and its figures to TensorBoard."""
        values = row.content()
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written: {error.strerror}") from error
        for key, value in values.items():
            if value is not None and key not in ("step", "images", "seconds", "split"):
                self.tensorboard.add_scalar(f"{row.split}/{key}", value, row.step)

    @distributed.main_only
    def save_best(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        checkpoint_format.write(self.best, meta, tensors)

    @distributed.main_only
    def save_last(
        self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], keep: int, numbered: bool
    ) -> None:
        """Writes the last checkpoint. If it is `numbered`, it also gets a name with its step. Of
        the numbered ones the newest `keep` stay.
        """
        checkpoint_format.write(self.last, meta, tensors)
        if numbered and keep:
            # A second name for the same bytes. `last` is replaced later, and never written into.
            name = self.checkpoints / f"step-{meta['step']:08d}{SUFFIX}"
            temporary = name.with_name(f".{name.name}.tmp")
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.last, temporary)
                temporary.replace(name)
            except OSError:  # a file system without hard links
                write_atomically(name, self.last.read_bytes())
        # Later ones, from before `--resume` of an earlier checkpoint, are not counted nor removed.
        names = sorted(self.checkpoints.glob(f"step-*{SUFFIX}"))
        for old in [n for n in names if n.name <= f"step-{meta['step']:08d}{SUFFIX}"][
            : -keep or None
        ]:
            old.unlink()

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.path / name
        if distributed.is_main():
            write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
        return path

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextlib.contextmanager
def _failing_quietly() -> Iterator[None]:
    """Suppresses the traceback of TensorBoard's thread if it cannot write. The next use of the
    writer raises the error anyway.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: (
        None if isinstance(args.exc_value, OSError) else before(args)
    )
    try:
        yield
    finally:
        threading.excepthook = before


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        # A kill may have cut the last line.
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)

"""The directory of a running run: its files, its lock, and cutting back on resume."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.background import Background
from flowtrain.checkpoints.format import SUFFIX
from flowtrain.config import Config
from flowtrain.errors import RunError, UserError, cut, is_disk_full
from flowtrain.pictures import grid
from flowtrain.results import Row
from flowtrain.system import capacity, distributed
from flowtrain.system.console import console
from flowtrain.system.files import (
    append_regular,
    content_of,
    lock,
    open_folder,
    read_regular,
    remove_left_overs,
    write_atomically,
)
from flowtrain.training import loggers
from flowtrain.training.loggers import Logger

MAX_SUMMARY_BYTES = 2**20
MAX_OWNER_BYTES = 100  # of `.lock`


class RunDirectory:
    """Paths and files under `RUN` (docs/runs.md). Of several processes, only process 0 writes."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.last = self.checkpoints / f"last{SUFFIX}"
        self.best = self.checkpoints / f"best{SUFFIX}"
        self.metrics = path / "metrics.jsonl"
        self.damaged = path / "metrics.damaged.jsonl"
        self._locked: os.stat_result | None = None  # of the directory while it is locked
        self.saving = Background()
        self._loggers: list[Logger] = []

    def holds_a_run(self) -> bool:
        return (self.path / "config.yaml").exists() or self.last.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out. The lock ends with the process, however that ends.

        Raises:
            UserError: if the directory is locked or cannot be used.
            RunError: if a file cannot be written later, or the directory was deleted.
        """
        if not distributed.is_main():
            yield
            return
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            # TensorBoard writes its path as UTF-8.
            raise UserError(
                f"--run-dir {cut(str(self.path))}: its name is not UTF-8; choose another name"
            ) from None
        with contextlib.ExitStack() as held:
            self._lock(held)
            for folder in (self.path, self.checkpoints, self.samples):
                remove_left_overs(folder)
            try:
                with _failing_quietly():
                    try:
                        yield
                    finally:
                        self.saving.wait()
                        self.close()
            except (OSError, RunError) as error:
                self._require_there()
                if isinstance(error, RunError):
                    raise
                raise RunError(
                    f"{error.filename or self.path}: cannot be written: {error.strerror or error}; "
                    f"what was saved before in {self.path} is kept"
                ) from error

    def _lock(self, held: contextlib.ExitStack) -> None:
        """Locks the directory itself, because a name in it may be deleted. `.lock` has the process
        id, and is locked too for file systems that lock no directories, such as NFS.
        """
        name, new = self.path / ".lock", not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open_folder(self.path)
            self._locked = self.path.stat()
            if handle is not None:
                held.callback(os.close, handle)
                try:
                    lock(handle, wait=False)
                except BlockingIOError as error:
                    raise self._in_use(name) from error
                except OSError:
                    pass
            file = held.enter_context(append_regular(name))
        except OSError as error:
            kind = RunError if is_disk_full(error) else UserError
            why = error.strerror or error
            if isinstance(error, FileExistsError):
                why = "it is a file; give the name of a folder"
            raise kind(f"--run-dir {self.path}: cannot be used: {why}") from error
        for folder in (self.checkpoints, self.samples):
            if folder.is_symlink():
                # In a stranger's run it may lead to any folder of the user.
                raise UserError(
                    f"--run-dir {self.path}: {folder} is a link, and files are replaced and "
                    f"removed there; let the run directory itself be the link"
                )
        try:
            lock(file.fileno(), wait=False)
        except (BlockingIOError, PermissionError) as error:  # the latter on SMB
            raise self._in_use(name) from error
        except OSError as error:
            console.print(
                f"{self.path}: its file system has no locks ({error.strerror}), so nothing keeps a "
                f"second run out"
            )
        if new:
            held.callback(self._remove_if_unused)
        with contextlib.suppress(OSError):  # a full disk, which the next file reports
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())

    def _remove_if_unused(self) -> None:
        """Removes the directory of a run that ends before it wrote anything."""
        with contextlib.suppress(OSError, RunError):
            self._require_there()
            if [*self.path.iterdir()] == [self.path / ".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def _in_use(self, name: Path) -> UserError:
        owner = "unknown"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            owner = cut(read_regular(name, MAX_OWNER_BYTES).decode()) or owner
        return UserError(
            f"--run-dir {self.path}: in use by another process (pid {owner}); "
            "wait for it, stop it, or choose another directory"
        )

    def _require_there(self) -> None:
        """Raises `RunError` if the path no longer leads to the directory that is locked."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self._locked and os.path.samestat(self.path.stat(), self._locked):
                return
        raise RunError(
            f"{self.path}: the run directory was deleted or moved during training: stopped, and "
            "nothing is written in its place"
        )

    def _write(self, path: Path, data: bytes) -> None:
        self._require_there()
        write_atomically(path, data)

    @distributed.main_only
    def begin(self, config: Config) -> None:
        """Makes the folders, and writes the resolved configuration."""
        for folder in (self.checkpoints, self.samples):
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise UserError(
                    f"--run-dir {self.path}: {folder} is not a folder; remove it"
                ) from error
        self._write(self.path / "config.yaml", config.yaml().encode())

    @distributed.main_only
    def cut_back(self, step: int, config: Config) -> None:
        """Cuts `metrics.jsonl` after `step`, and opens the loggers, which continue from there."""
        self.close()
        self.tidy_metrics(step)
        self._loggers = loggers.opened(config.train.logger, self.path, config, step)

    def tidy_metrics(self, step: int) -> None:
        """Removes from `metrics.jsonl` the lines after `step`, and a last line cut by a kill.
        Damaged lines are moved to `metrics.damaged.jsonl`.
        """
        self._require_there()
        content = self._read(self.metrics)
        *lines, last = content.split(b"\n")
        if _row(last) is not None:
            lines.append(last)
        rows = [(line, _row(line)) for line in lines]
        damaged = [line for line, row in rows if row is None and line]
        if damaged:
            before = self._read(self.damaged)
            known = before.split(b"\n")  # a kill may have come before they were removed
            new = [line for line in damaged if line not in known]
            self._write(self.damaged, before + b"".join(line + b"\n" for line in new))
            first = lines.index(damaged[0]) + 1
            console.print(
                f"{self.metrics}: damaged lines: {len(damaged)}, the first is line {first}; moved "
                f"to {self.damaged}"
            )
        kept = b"".join(line + b"\n" for line, row in rows if row is not None and row.step <= step)
        if kept != content:
            self._write(self.metrics, kept)

    def best_step(self) -> int | None:
        """The step of the best checkpoint, or None if it is missing or damaged."""
        with contextlib.suppress(UserError):
            step: int = checkpoint_format.read(self.best).meta["step"]
            return step
        return None

    def last_validation(self) -> Row | None:
        rows = map(_row, reversed(self._read(self.metrics).split(b"\n")))
        return next((row for row in rows if row is not None and row.split == "validation"), None)

    def _read(self, path: Path) -> bytes:
        """The content of a file of lines, nothing if it is missing. Raises `UserError`."""
        # Its lines, one by one, take a few times as much.
        return content_of(path, capacity.total() // 16) if path.exists() else b""

    @distributed.main_only
    def chart(self, values: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, step)

    @distributed.main_only
    def log(self, row: Row) -> None:
        """Writes a line of `metrics.jsonl`, flushed, and gives its figures to the loggers."""
        values = row.content()
        self._require_there()
        try:
            with append_regular(self.metrics) as file:
                file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written: {error.strerror}") from error
        self.chart(
            {
                f"{row.split}/{key}": value
                for key, value in values.items()
                if value is not None and key not in ("step", "images", "seconds", "split")
            },
            row.step,
        )

    @distributed.main_only
    def save_last(
        self,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        summary: Mapping[str, Any],
        *,
        keep: int,
        numbered: bool,
        best: bool,
        wait: bool,
    ) -> None:
        """Writes the last checkpoint and `summary.json` in the background, or before it returns
        (`wait`). The same bytes are the `best` ones, and get a name with their step if they are
        `numbered`. Of the numbered ones the newest `keep` stay.

        After a kill before the checkpoint is written, the next command trains those steps again. So
        the charts, which do not follow from it, are on the disk first.
        """
        for logger in self._loggers:
            logger.flush()
        also = [self._numbered(meta["step"])] if numbered and keep else []
        also += [self.best] if best else []

        def write(tensors: Mapping[str, Tensor]) -> None:
            self._require_there()
            write_atomically(self.last, checkpoint_format.pieces(meta, tensors), also)
            self.prune(meta["step"], keep)
            self.write_json("summary.json", summary)

        if wait:
            self.saving.finish()
            write(tensors)
        else:
            self.saving.start(tensors, write)

    def _numbered(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}{SUFFIX}"

    def prune(self, step: int, keep: int) -> None:
        """Removes all numbered checkpoints up to `step` but the newest `keep`. Later ones, from
        before `--resume` of an earlier checkpoint, do not count and stay.
        """
        names = sorted(self.checkpoints.glob(f"step-*{SUFFIX}"))
        for old in [n for n in names if n.name <= self._numbered(step).name][: -keep or None]:
            old.unlink()

    @distributed.main_only
    def save_sample(self, step: int, picture: Tensor) -> None:
        """Writes a picture of samples, uint8 `(3, H, W)`, and gives it to the loggers."""
        self._write(self.samples / f"step-{step:08d}.png", grid.png(picture))
        for logger in self._loggers:
            logger.picture("samples", picture, step)

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; empty if it is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(read_regular(self.path / "summary.json", MAX_SUMMARY_BYTES))
            if isinstance(content, dict):
                return content
        return {}

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.path / name
        if distributed.is_main():
            self._write(path, (json.dumps(values, indent=2) + "\n").encode())
        return path

    def close(self) -> None:
        """Closes the loggers, all of them even if one cannot write."""
        with contextlib.ExitStack() as all_of_them:
            while self._loggers:
                all_of_them.callback(self._loggers.pop().close)


@contextlib.contextmanager
def _failing_quietly() -> Iterator[None]:
    """Hides the traceback of TensorBoard's thread. The next use of the writer raises its error."""
    before = threading.excepthook
    threading.excepthook = lambda args: (
        None if isinstance(args.exc_value, OSError) else before(args)
    )
    try:
        yield
    finally:
        threading.excepthook = before


def _row(line: bytes) -> Row | None:
    """A line of `metrics.jsonl`, or None if it is damaged."""
    try:
        return Row.model_validate_json(line)
    except ValidationError:
        return None

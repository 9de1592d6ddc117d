"""Kills a short run at its file operations, gives the same command again, and compares what it
leaves with an undisturbed run: `python kills.py FOLDER POINT...` or `python kills.py FOLDER all`.

Prints one JSON object: the number of file operations of the undisturbed run, the number of runs
that were killed, and the differences that were found, each with the operation that was the last.

An operation is opening a file for writing, writing (before it and halfway through it), flushing,
renaming, linking, removing, and making a folder. Those of TensorBoard's own thread do not count,
because their number is not fixed. Checkpoints are written by a thread, too, and count. Each run
has it wait at random before each of its operations, so that the loop is sometimes ahead of it.
"""

import builtins
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import children
from catalogue import WORDS, sets
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowtrain.checkpoints import background
from flowtrain.checkpoints import format as checkpoint_format

COMMAND = [
    *["train", *WORDS["glow"], "--run-dir", "run"],
    *sets(train__batch_size=16, train__num_steps=5, train__log_every=1, train__ema=0.9),
    *sets(train__validate_every=1, train__checkpoint_every=2, train__sample_every=3),
    *sets(train__keep_checkpoints=1, data__validation=20),
]
FUNCTIONS = ("open", "fsync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir")
CLOCK = r'"(seconds|images_per_second)": [^,}\n]+'
SLOWEST = 0.02  # seconds that the thread waits before an operation; a step takes about as long


class Operations:
    """Counts the file operations of this process, and kills it at number `fatal`."""

    def __init__(self, fatal: int | None, log: Path):
        self.count = 0
        self.lock = threading.Lock()
        # Every second run has a thread that does not wait.
        self.slowest = SLOWEST * ((fatal or 0) % 2)
        self.draw = random.Random(fatal)
        self.fatal = fatal
        self.log = log.open("w", buffering=1)  # written line by line
        for name in FUNCTIONS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        self.io_open = io.open
        builtins.open = io.open = self.open

    def before(self, what: str) -> None:
        """To be called before each operation."""
        thread = threading.current_thread()
        if thread.name.startswith(background.THREAD):
            time.sleep(self.draw.random() * self.slowest)
        elif thread is not threading.main_thread():
            return
        with self.lock:
            self.count += 1
            self.log.write(f"{what} ({thread.name})\n")
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, name, function):
        def wrapped(path, *args, **options):
            writes = name != "open" or (args and args[0] & (os.O_WRONLY | os.O_RDWR))
            if writes:
                self.before(f"{name} {path}")
            return function(path, *args, **options)

        return wrapped

    def open(self, path, mode="r", *args, **options):
        if not set(mode) & set("wax+"):
            return self.io_open(path, mode, *args, **options)
        if not isinstance(path, int):
            self.before(f"open {path}")
        file = self.io_open(path, mode, *args, **options)
        write = file.write

        def counted_write(data):
            self.before(f"write {path}")
            if self.count + 1 == self.fatal:
                write(data[: len(data) // 2])
                file.flush()
            self.before(f"half of write {path}")
            return write(data)

        file.write = counted_write
        return file


def run(folder: Path, fatal: int | None = None) -> tuple[children.Outcome, list[str]]:
    """The outcome of the command in `folder`, killed at operation `fatal`, and its operations."""
    log = folder / "operations"
    done = children.run(COMMAND, folder, before=lambda: Operations(fatal, log))
    return done, log.read_text().splitlines()


def content(run: Path) -> dict[str, object]:
    """All in a run directory, except times."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or path.name == ".lock" or "tfevents" in path.name:
            continue
        if path.suffix == ".safetensors":
            saved = checkpoint_format.read(path)
            saved.meta["progress"]["seconds"] = 0
            found[name] = saved.meta, {k: v.numpy().tobytes() for k, v in saved.tensors.items()}
        elif path.suffix in (".json", ".jsonl"):
            found[name] = re.sub(CLOCK, "", path.read_text())
        else:
            found[name] = path.read_bytes()
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if not tag.endswith("images_per_second"):
            found[f"events: {tag}"] = [(each.step, each.value) for each in events.Scalars(tag)]
    found["events: samples"] = [image.step for image in events.Images("samples")]
    return found


def differences(folder: Path, fatal: list[int], wanted: dict[str, object]) -> list[str]:
    """What is other than `wanted` after the command was killed at these operations, one after the
    other, and then given again.
    """
    shutil.rmtree(folder)
    folder.mkdir()
    said = []
    for number in fatal:
        done, operations = run(folder, number)
        if done.code == -signal.SIGKILL:
            said.append(operations[-1])
        elif done.code != 0:
            return [f"after a kill at {said}: {done}"]
    for path in (folder / "run" / "checkpoints").glob("[!.]*"):
        try:
            checkpoint_format.read(path)
        except Exception as error:
            said.append(f"damaged after the kill: {error}")
    done, _ = run(folder)
    if done.code != 0:
        return [f"after a kill at {said}: {done}"]
    found = content(folder / "run")
    return [
        f"{name} differs after a kill at {said}"
        for name in sorted(wanted.keys() | found.keys())
        if name not in found or name not in wanted or found[name] != wanted[name]
    ]


def main(folder: Path, points: list[str]) -> dict[str, object]:
    children.prepare()
    folder.mkdir()
    done, operations = run(folder)
    assert done.code == 0, done
    wanted, count = content(folder / "run"), len(operations)
    draw = random.Random(0)
    if points == ["all"]:
        plans = [[number] for number in range(1, count + 1)]
        # twice: the command that goes on is killed, too
        plans += [[draw.randint(1, count), draw.randint(1, count)] for _ in range(count)]
    else:
        plans = [[draw.randint(1, count)] for _ in range(int(points[0]))]
    losses = [each for plan in plans for each in differences(folder, plan, wanted)]
    return {"operations": count, "kills": len(plans), "losses": losses}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main(Path(sys.argv[1]), sys.argv[2:])
    print(json.dumps(result))

"""Kills a sweep and its commands at once, at file operations chosen at random, and gives the same
command again. `python killed.py FOLDER KILLS` prints the results, and those of a whole sweep.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "adversarial"))

import children
import kills

from flowtrain.tools.sweep import table
from flowtrain.tools.sweep.work import Sweep

assert table  # imported before the fork
COMMAND = ["sweep", "sweep.yaml", "--workers", "1", "--out", "s", "--device", "cpu"]
PLAN = """
config: glow_digits
set: [model.steps=1, train.batch_size=16, train.checkpoint_every=3, train.validate_every=4,
      train.sample_every=100, "train.logger=[]", train.ema=0.9, data.validation=20]
rows: [none, model.levels=9]
ranges: {model.width: {low: 4, high: 9}, train.lr: {low: 1e-4, high: 1e-2, log: true}}
trials: 2
images: 128
halving: 4
"""


class Operations(kills.Operations):
    """Counts the file operations of the sweep and of its commands. All of them end at `fatal`."""

    def __init__(self, fatal: int | None, log: Path):
        os.setpgid(0, 0)
        Sweep._call = forked
        self.shared = multiprocessing.Value("q")
        super().__init__(fatal, log)

    def before(self, what: str) -> None:
        with self.shared.get_lock():
            self.shared.value += 1
            self.count = self.shared.value
            self.log.write(f"{what}\n")
            if self.count == self.fatal:
                os.killpg(0, signal.SIGKILL)


def forked(self, words, log, environment, claim) -> int:
    """In place of `Sweep._call`: a fork, which has imported everything."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        children.become(words, Path.cwd(), [log.name] * 2, seconds=120, memory=768)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, fatal: int | None = None) -> tuple[children.Outcome, int]:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(PLAN)
    log = folder / "operations"
    done = children.run(COMMAND, folder, seconds=120, before=lambda: Operations(fatal, log))
    return done, len(log.read_text().splitlines())


def results(folder: Path) -> dict[str, object]:
    """The table and the result of each rung, without times."""
    found = {"table": json.loads((folder / "s" / "table.json").read_text())}
    for file in sorted((folder / "s").glob("*/rung-*.json")):
        found[f"{file.parent.name}/{file.name}"] = [json.loads(file.read_text())]
    return {name: [{**row, "seconds": 0} for row in rows] for name, rows in found.items()}


def main(folder: Path, count: int) -> dict[str, object]:
    children.prepare()
    folder.mkdir()
    _, operations = run(folder / "whole")
    draw, killed = random.Random(0), 0
    # Not before the end after so many operations in all. The last two may come after it.
    points = [draw.randint(1, operations // count) for _ in range(count)]
    for fatal in (*points, operations // 3, operations // 3, None):
        done, _ = run(folder / "killed", fatal)
        assert done.code in (0, -signal.SIGKILL), done
        killed += done.code != 0
    assert done.code == 0, done
    both = {name: results(folder / name) for name in ("whole", "killed")}
    return {"kills": killed, **both}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(result))

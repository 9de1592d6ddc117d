"""Starting up: the help, beside an empty Typer application's, and the first training step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import SHAPE, WORK, arguments, heading, in_turns, markdown, table

EMPTY = """\
import typer

app = typer.Typer()


@app.command()
def main() -> None:
    pass


app()
"""


def first_step(folder: Path, data: Path, precision: str) -> float:
    """Seconds from starting `flowtrain train` to the line of its first step in metrics.jsonl. It is
    then stopped.
    """
    work = WORK["S"]
    words = ["data.name=npz", f"data.path={data}", "model.name=glow"]
    words += [f"model.{key}={getattr(work, key)}" for key in ("levels", "steps", "width")]
    words += [f"train.batch_size={work.batch_size}", f"train.precision={precision}"]
    words += ["train.log_every=1"]
    run = folder / f"run-{time.monotonic_ns()}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "flowtrain", "train", "--run-dir", str(run), "--device", "cpu"]
    process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("flowtrain train ended before its first step")
            time.sleep(0.005)
        return time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()


def random_data(folder: Path) -> Path:
    """As many pixels as CIFAR-10, but noise, which does not compress."""
    random = np.random.default_rng(0)
    channels, height, width = SHAPE
    arrays = {
        name: random.integers(0, 256, (count, height, width, channels), np.uint8)
        for name, count in (("x_train", 50000), ("x_test", 10000))
    }
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return folder / "data.npz"


def main() -> None:
    parser = arguments(__doc__, data="")
    parser.set_defaults(repeats=21)
    parser.add_argument("--starts", type=int, default=5, help="times that training is started")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the commands
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty.py").write_text(EMPTY)

        def python(*words: str) -> None:
            subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=folder
            )

        heading("Start: the command line", options.threads)
        empty = "an empty Typer application, --help"
        contenders = {
            empty: ["empty.py", "--help"],
            "flowtrain --help": ["-m", "flowtrain", "--help"],
            "flowtrain train --help": ["-m", "flowtrain", "train", "--help"],
            "flowtrain --version": ["-m", "flowtrain", "--version"],
        }
        seconds = in_turns(
            {name: lambda w=words: python(*w) for name, words in contenders.items()},
            options.repeats,
        )
        table(seconds, {"to the empty one": empty}, unit="ms")

        heading("Start: to the first training step of S, from pressing return", options.threads)
        data = Path(options.data).resolve() if options.data else random_data(folder)
        rows = []
        for precision in ("fp32", "bf16"):
            first_step(folder, data, precision)  # fills the disk's cache
            times = [first_step(folder, data, precision) for _ in range(options.starts)]
            figures = [f"{figure(times):.2f}" for figure in (statistics.median, min, max)]
            rows.append([f"{precision}, {data.name}", *figures])
        markdown(["", "median (s)", "least", "most"], rows)


if __name__ == "__main__":
    main()

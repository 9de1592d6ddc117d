"""A data set as large as ImageNet at 64x64, which does not fit into memory: the time from the start
of training to its first step, the memory of each process, and how long a step waits for its images.

It makes the data set (15.7 GB by default) in a temporary folder and removes it. Training is
`flowtrain train` itself under torchrun, twice: at first nothing is known of the file.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, heading

SIDE = 64
AT_A_TIME = 10_000  # images, while the file is written
TEST_IMAGES = 1000


def write(path: Path, count: int) -> None:
    """An .npz file of `count` images to train on. Each is noise, of 256 kinds, with its number in
    the first four bytes, so that no two are equal.
    """
    random = np.random.default_rng(0)
    kinds = random.integers(0, 256, (256, SIDE, SIDE, 3), np.uint8)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, images in (("x_train", count), ("x_test", TEST_IMAGES)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                shape = (images, SIDE, SIDE, 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, images, AT_A_TIME):
                    numbers = np.arange(start, min(start + AT_A_TIME, images), dtype="<u4")
                    part = kinds[numbers % len(kinds)]
                    part.reshape(len(part), -1)[:, :4] = numbers.view(np.uint8).reshape(-1, 4)
                    file.write(part.data)


def train(folder: Path, run: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each process reports of a short run."""
    report = folder / f"{run}.reports"
    report.mkdir()
    settings = {
        "data.name": "npz",
        "data.path": folder / "data.npz",
        "model.name": "glow",
        "model.levels": 3,
        "model.steps": options.depth,
        "model.width": options.width,
        "train.batch_size": options.batch_size,
        "train.num_steps": options.steps,
        "data.max_in_memory": 0,  # also where fewer images would fit
        "data.validation": 100,
        "train.sample_every": options.steps,
        "train.checkpoint_every": options.steps,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    several = [f"--nproc-per-node={options.processes}", "--standalone"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, options.threads // options.processes)),
        "FLOWTRAIN_CACHE": str(folder / "cache"),
        "STARTED": str(time.time()),
    }
    subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", *several, __file__],
            *["--report", str(report), "train", *words, "--run-dir", str(folder / run)],
            *["--device", options.device],
        ],
        check=True,
        env=environment,
        stdout=sys.stderr,
    )
    return [json.loads(path.read_text()) for path in sorted(report.iterdir())]


def reporting(report: Path, words: list[str]) -> None:
    """The command, in a process that then writes how long it waited and what memory it takes."""
    from flowtrain.cli.main import main as flowtrain
    from flowtrain.data.batches import Batches

    calls: list[tuple[float, float]] = []  # when a batch was asked for, and when it was there
    at = Batches.at

    def timed(self: Batches, progress: Any) -> Any:
        begun = time.time()
        batch = at(self, progress)
        calls.append((begun, time.time()))
        return batch

    Batches.at = timed  # type: ignore[method-assign]
    sys.argv = ["flowtrain", *words]
    try:
        flowtrain()
    finally:
        if len(calls) > 2:
            # The first step starts the threads that read ahead.
            waits = [there - begun for begun, there in calls[1:]]
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            content = {
                "first_step": calls[1][0] - float(os.environ["STARTED"]),
                "share": sum(waits[:-1]) / (calls[-1][0] - calls[1][0]),
                "step": statistics.median(b[0] - a[0] for a, b in itertools.pairwise(calls[1:])),
                "longest_wait": max(waits),
                "own": int(status["RssAnon"].split()[0]) / 1024,
                "file": int(status["RssFile"].split()[0]) / 1024,
                "peak": int(status["VmHWM"].split()[0]) / 1024,
            }
            (report / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(content))


def main() -> None:
    parser = arguments(__doc__, device="cpu", folder="")
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="steps of each run")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a process in a step")
    parser.add_argument("--depth", type=int, default=4, help="steps of flow per level")
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        size = options.images * SIDE * SIDE * 3
        if size * 1.05 > shutil.disk_usage(folder).free:
            raise SystemExit(f"{size / 1e9:.1f} GB do not fit into {folder}: give a --folder")
        heading(
            f"{options.images:,} images of {SIDE}x{SIDE} ({size / 1e9:.1f} GB), "
            f"{options.processes} processes of {options.batch_size} images",
            options.threads,
        )
        write(folder / "data.npz", options.images)
        print(
            "| start | process | to the end of the first step (s) | step (s) | waiting for images "
            "| longest wait (ms) | own memory (MiB) | pages of files (MiB) | peak (MiB) |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for run in ("first", "second"):
            for rank, found in enumerate(train(folder, run, options)):
                print(
                    f"| {run} | {rank} | {found['first_step']:.1f} | {found['step']:.2f} | "
                    f"{100 * found['share']:.3f}% | {1000 * found['longest_wait']:.1f} | "
                    f"{found['own']:,.0f} | {found['file']:,.0f} | {found['peak']:,.0f} |",
                    flush=True,
                )
    print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        reporting(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()

"""Data: how long the training loop waits for a batch from each kind of source, as a share of a step
of S.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHAPE, WORK, arguments, begin, flowtrain_state, flowtrain_step, images
from PIL import Image

from flowtrain import config as configuration
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.training.state import Progress


def sources(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """The same `count` images in an .npz file and in a folder, read into memory, or by threads as
    they are needed.
    """
    pixels = images(count).movedim(1, -1).numpy()
    np.savez(folder / "data.npz", x_train=pixels)
    (folder / "pictures").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "pictures" / f"{index:05}.png")
    npz = {"name": "npz", "path": str(folder / "data.npz")}
    pictures = {"name": "folder", "path": str(folder / "pictures"), "size": SHAPE[1]}
    return {
        ".npz in memory": npz,
        ".npz in memory, flipped and shifted": {**npz, "flip": True, "shift": 4},
        ".npz streamed": {**npz, "max_in_memory": 0},
        "folder in memory": pictures,
        "folder streamed, a memory map": {**pictures, "max_in_memory": 0},
        "folder streamed, flipped and shifted": {
            **pictures,
            "max_in_memory": 0,
            "flip": True,
            "shift": 4,
        },
    }


def main() -> None:
    parser = arguments(__doc__, precision="bf16")
    parser.add_argument("--steps", type=int, default=40, help="steps for each source")
    parser.add_argument("--images", type=int, default=4000)
    options = parser.parse_args()
    work = WORK["S"]
    begin(f"Waiting for a batch, beside a training step of S in {options.precision}", options)
    with tempfile.TemporaryDirectory() as name:
        os.environ["FLOWTRAIN_CACHE"] = str(Path(name, "cache"))
        state = flowtrain_state(work, precision=options.precision)
        print(
            "| | wait (ms), mean | median | most | step (ms), median | share of the time | first "
            "batch (ms) |"
        )
        print("|---|---|---|---|---|---|---|")
        for source, data in sources(Path(name), options.images).items():
            train = {"num_steps": 1, "batch_size": work.batch_size}
            config = configuration.parse(
                {"data": data, "model": {"name": "glow"}, "train": train}, source
            )
            batches = Batches(DataSet(config.data), config, work.batch_size, torch.device("cpu"))
            started = time.perf_counter()
            progress = Progress()
            flowtrain_step(state, batches.at(progress)[0])  # starts the workers
            first = time.perf_counter() - started
            waits, steps = [], []
            started = time.perf_counter()
            for _ in range(options.steps):
                begun = time.perf_counter()
                progress.step += 1
                progress.images += work.batch_size
                x, _ = batches.at(progress)
                ready = time.perf_counter()
                flowtrain_step(state, x)
                waits.append(ready - begun)
                steps.append(time.perf_counter() - ready)
            share = sum(waits) / (time.perf_counter() - started)
            cells = [
                statistics.mean(waits),
                statistics.median(waits),
                max(waits),
                statistics.median(steps),
            ]
            print(f"| {source} | " + " | ".join(f"{1000 * cell:.3f}" for cell in cells), end="")
            print(f" | {100 * share:.2f}% | {1000 * first:.0f} |", flush=True)
            batches.close()
    print()


if __name__ == "__main__":
    main()

"""Evaluation beside bare forward passes of the same images, at several batch sizes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import WORK, arguments, begin, flowtrain_state, images, in_turns, table
from torch import Tensor

from flowtrain.data.splits import Split
from flowtrain.evaluation.score import score
from flowtrain.flow.flow import Flow
from flowtrain.system.random import Stream, uniform


@torch.no_grad()
def bare(flow: Flow, x: Tensor, noise: Tensor, batch_size: int) -> None:
    for part, part_noise in zip(x.split(batch_size), noise.split(batch_size), strict=True):
        flow(part, part_noise)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128, 250, 500])
    options = parser.parse_args()
    begin(f"Evaluation of {options.images} images by S", options)
    flow = flowtrain_state(WORK["S"]).flow
    x = images(options.images)
    split = Split(x.numpy(), np.arange(len(x)), 0)
    noise = uniform(x.shape, 0, Stream.EVALUATION)
    contenders: dict[str, Callable[[], object]] = {
        f"forward passes, batches of {size}": lambda size=size: bare(flow, x, noise, size)
        for size in options.batch_sizes
    }
    contenders["flowtrain.evaluation.score.score, as it chooses"] = lambda: score(flow, split)
    contenders["of it, the noise"] = lambda: uniform(x.shape, 0, Stream.EVALUATION)
    seconds = in_turns(contenders, options.repeats, warmup=1)
    fastest = min(
        list(seconds)[: len(options.batch_sizes)],
        key=lambda name: sorted(seconds[name])[options.repeats // 2],
    )
    table(seconds, {"to the fastest forward passes": fastest})
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(f"peak memory: {int(peak.split()[1]) // 1024} MiB\n")


if __name__ == "__main__":
    main()

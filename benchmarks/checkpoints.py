"""Checkpoints: how long training is held up by one of `glow_cifar.yaml`, and how long it takes."""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from common import WORK, arguments, begin, flowtrain_state, flowtrain_step, images
from torch import Tensor

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.background import Background
from flowtrain.system.files import write_atomically


def through_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As a checkpoint was written before: in memory three times, and all of it before the next
    step.
    """
    metadata = {"flowtrain": json.dumps({}), "checksum": "0" * 64}
    data = bytearray(safetensors.torch.save(dict(tensors), metadata))
    start = data.index(b"0" * 64)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    write_atomically(path, bytes(data))


def main() -> None:
    parser = arguments(__doc__, model="P", folder="")
    parser.set_defaults(repeats=5)
    parser.add_argument("--steps", type=int, default=1, help="training steps after each checkpoint")
    options = parser.parse_args()
    work = WORK[options.model]
    begin(f"Checkpoints of {options.model}", options)
    state = flowtrain_state(work, optimizer="muon")
    x = images(work.batch_size)
    flowtrain_step(state, x)
    tensors = state.tensors()
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{len(tensors):,} tensors, {size / 1e6:,.0f} MB\n")
    background = Background()

    ended = 0.0  # when the last one was written

    def write(path: Path, given: Mapping[str, Tensor]) -> None:
        nonlocal ended
        write_atomically(path, checkpoint_format.pieces({}, given))
        ended = time.perf_counter()

    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        path = Path(name, "last.safetensors")
        ways: dict[str, Callable[[], None]] = {
            "as before": lambda: through_safetensors(path, state.tensors()),
            "waiting": lambda: write(path, state.tensors()),
            "in the background": lambda: background.start(
                state.tensors(), lambda copied: write(path, copied)
            ),
        }
        held: dict[str, list[float]] = {way: [] for way in ways}
        steps: dict[str, list[float]] = {way: [] for way in ways}
        written: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats + 1):
            for way, save in ways.items():
                started = time.perf_counter()
                save()
                saved = time.perf_counter()
                for _ in range(options.steps):
                    flowtrain_step(state, x)
                stepped = time.perf_counter()
                background.finish()
                if repeat == 0:  # fills the memory that is kept
                    continue
                held[way].append(saved - started)
                steps[way].append((stepped - saved) / options.steps)
                written[way].append((saved if way == "as before" else ended) - started)
    print(
        "| a checkpoint is written | training is held up (s), median | least | most | to the one "
        "as before | a step after it (s) | until it is written (s) |\n|---|---|---|---|---|---|---|"
    )
    for way, seconds in held.items():
        pairs = zip(seconds, held["as before"], strict=True)
        ratio = statistics.median(mine / before for mine, before in pairs)
        print(
            f"| {way} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | "
            f"{max(seconds):.3f} | {ratio:.3f} | {statistics.median(steps[way]):.2f} | "
            f"{statistics.median(written[way]):.2f} |"
        )
    print(flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

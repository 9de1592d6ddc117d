"""Training steps on a GPU: images/s, TFLOP/s, memory, and the operations that take the time.

`--device cpu` measures a CPU instead. `--peak` is the card's specified rate of dense bf16 products
in TFLOP/s (989 for an H100 SXM, 312 for an A100). The share of it is then printed too. What
`train.memory` computes again takes time, but does not count as operations.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from common import WORK, Work, arguments, begin, flowtrain_state, flowtrain_step, images
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flowtrain.system import device as devices
from flowtrain.system.capacity import peak
from flowtrain.training.state import State
from flowtrain.training.step import train_step

COUNTED_IMAGES = 8
PROFILED_STEPS = 3


def main() -> None:
    parser = arguments(__doc__, work="P", device="cuda", precision="bf16", memory="store")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="steps per repeat")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    options = parser.parse_args()
    work = dataclasses.replace(WORK[options.work], batch_size=options.batch_size)
    device = devices.resolve(options.device)
    begin(
        f"Training steps on {_name(device)}, {options.precision}, {options.memory}: {work}", options
    )
    state = flowtrain_state(
        work, options.device, precision=options.precision, memory=options.memory
    )
    x = images(work.batch_size).to(device)

    seconds = _seconds_of_a_step(
        lambda: flowtrain_step(state, x), device, options.repeats, options.steps
    )
    flops = _operations(work, x) * work.batch_size / seconds
    share = (
        f", {100 * flops / 1e12 / options.peak:.1f}% of {options.peak:g}" if options.peak else ""
    )
    print("| s per step | images/s | TFLOP/s | MiB at the peak, beyond weights and optimizer |")
    print("|---|---|---|---|")
    memory = peak(lambda: flowtrain_step(state, x), device) / 2**20
    print(
        f"| {seconds:.4f} | {work.batch_size / seconds:,.0f} | {flops / 1e12:.3g}{share} | "
        f"{memory:,.0f} |"
    )
    print(f"\nOf {PROFILED_STEPS} steps:\n\n```\n{_profile(state, x, device)}\n```", flush=True)


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"the {device.type.upper()}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds_of_a_step(
    step: Callable[[], None], device: torch.device, repeats: int, steps: int
) -> float:
    """Median over `repeats` of the mean over `steps`, which queue on a GPU one after the other."""
    step()
    means = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        _wait(device)
        means.append((time.perf_counter() - started) / steps)
    return statistics.median(means)


def _operations(work: Work, x: torch.Tensor) -> float:
    """Floating-point operations of a training step for one image, of products and convolutions."""
    state = flowtrain_state(work, x.device.type)  # with `memory: store`: nothing is computed twice
    with FlopCounterMode(display=False) as counter:
        train_step(state, x[:COUNTED_IMAGES])
    return counter.get_total_flops() / len(x[:COUNTED_IMAGES])


def _profile(state: State, x: torch.Tensor, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(PROFILED_STEPS):
            flowtrain_step(state, x)
        _wait(device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)


if __name__ == "__main__":
    main()

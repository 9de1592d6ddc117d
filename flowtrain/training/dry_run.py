"""`train --dry-run`: what a run will cost, from random pixels, so that nothing is downloaded or
written.
"""

import dataclasses
import functools
import math
import statistics
import time
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from flowtrain.bijections.memory import Mode
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config
from flowtrain.data.batches import INITIALIZATION_IMAGES
from flowtrain.data.splits import DataSet
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import distributed
from flowtrain.system.capacity import available, peak
from flowtrain.system.console import console, duration
from flowtrain.system.random import Stream, generator
from flowtrain.training.optim import Average, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import is_trainable, optimizer_step, require_trainable, train_step

TIMED_STEPS = 3
MEASURED_IMAGES = 8  # at first, from which follows what a batch of any size takes
DOUBLED = 1.75  # from here on, what twice the images take is called twice as much
MIB = 2**20


def dry_run(config: Config, device: torch.device) -> None:
    """Prints the parameters, the memory and the speed of a run. Raises `UserError` where it could
    not start.
    """
    data = DataSet(config.data)
    flow = build_flow(config, data.shape, data.levels).to(device)
    require_trainable(flow, config)
    _print_parameters(flow)

    train = config.train
    batch = train.batch_size * train.accumulate
    random = generator(config.seed, Stream.ORDER)
    labels = torch.arange(batch, device=device) % flow.classes if flow.classes else None
    x = flow.kind.random((batch, *data.shape), random).to(device)
    some = x[:INITIALIZATION_IMAGES]
    initialize(flow, some, draw_noise(some.shape, random, device))
    averaged = Average(flow, train.ema) if train.ema else None
    state = State(config, flow, build_optimizers(flow, train), averaged, {})

    _print_compute(state, x)
    fits = _print_memory(state, x[: train.batch_size], device)
    if not all(distributed.exchange(fits)):
        console.print("speed: not measured, for that would not fit")
        return
    per_step = _seconds_of_a_step(state, x, labels)
    images = distributed.world() * batch / per_step
    console.print(
        f"speed: {per_step:.3f} s a step, {images:,.0f} images/s (median of {TIMED_STEPS} steps)"
    )
    if train.num_steps is not None:
        console.print(
            f"estimated time: {duration(per_step * train.num_steps)} for {train.num_steps:,} "
            f"steps, validation apart"
        )
    else:
        assert train.budget is not None
        steps = train.budget / per_step
        console.print(
            f"estimated steps: {steps:,.0f} in {duration(train.budget)}, validation apart"
        )


def _seconds_of_a_step(state: State, x: torch.Tensor, labels: torch.Tensor | None) -> float:
    seconds = []
    for step in range(TIMED_STEPS + 1):
        started = time.perf_counter()
        _, grad_norm = train_step(state, x, labels)
        optimizer_step(state, grad_norm)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        if step > 0:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _with_memory(state: State, mode: Mode) -> State:
    """The same with another `train.memory`. Without optimizers gradients stay, and add up."""
    train = state.config.train.model_copy(update={"memory": mode})
    return dataclasses.replace(
        state, config=state.config.model_copy(update={"train": train}), optimizers=[]
    )


def _print_memory(state: State, x: torch.Tensor, device: torch.device) -> bool:
    """What each mode of `train.memory` takes at this batch size, and the largest batch that would
    fit.

    Measured with a few images, so that it can be said of too large a batch. Returns whether the
    chosen mode fits.
    """
    few = x[:MEASURED_IMAGES]
    _, grad_norm = train_step(state, few)
    optimizer_step(state, grad_norm)  # makes the optimizers' state
    gradients = sum(p.nbytes for p in state.flow.parameters())
    kept = [
        t
        for optimizer in state.optimizers
        for values in optimizer.state.values()
        for t in values.values()
    ]
    kept += [] if state.average is None else state.average.flow.parameters()
    fixed = 2 * gradients + sum(t.nbytes for t in kept)
    free = available(device)
    # The processes of a machine share its memory. All but the activations is there already.
    left = free // distributed.local_world() if device.type == "cpu" else free
    console.print(
        f"memory: {fixed / MIB:,.0f} MiB for weights, gradients and optimizer, and for "
        f"activations, "
        f"with {free / MIB:,.0f} MiB available:"
    )
    chosen_fits = True
    for mode in get_args(Mode):
        if not is_trainable(state.flow, mode, state.config.train.precision):
            continue
        constant, per_image = _activations(_with_memory(state, mode), x, device)
        needed = constant + per_image * len(x)
        chosen = mode == state.config.train.memory
        if chosen:
            chosen_fits = needed <= left
        console.print(
            f"  {mode}: {needed / MIB:,.0f} MiB for {len(x)} images, up to "
            f"{max(0, left - constant) // per_image:,.0f} "
            f"images would fit{' (chosen)' if chosen else ''}"
        )
    state.zero_grad()
    return chosen_fits


def _activations(state: State, x: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Bytes of a step beyond the gradients, whatever its images, and those for each image.

    From two numbers of images, so many that what each takes outweighs the rest (copies of weights,
    and the like).
    """
    size = math.ceil(min(MEASURED_IMAGES, len(x)) / 2)
    peaks = [_peak_of_a_step(state, x[:size], device)]
    while size < len(x) and (len(peaks) < 2 or peaks[-1] < DOUBLED * peaks[-2]):
        before, size = size, min(2 * size, len(x))
        peaks.append(_peak_of_a_step(state, x[:size], device))
    per_image = (peaks[-1] - peaks[-2]) / (size - before) if len(peaks) > 1 else peaks[0] / size
    per_image = max(1.0, per_image)
    return peaks[-1] - per_image * size, per_image


def _peak_of_a_step(state: State, x: torch.Tensor, device: torch.device) -> int:
    step = functools.partial(train_step, state, x)
    step()  # makes what is made once
    # the same everywhere: all take as many steps
    return max(distributed.exchange(peak(step, device)))


def _convolution_backward(grad: Any, x: Any, weight: Any, *others: Any, out_shape: Any) -> int:
    """Each gradient costs what the convolution does. (torch's count of the weight's knows of no
    groups.)
    """
    of_x, of_weight, _ = others[-1]
    return conv_flop_count(x, weight, grad) * (of_x + of_weight)


def _print_compute(state: State, x: torch.Tensor) -> None:
    """Floating-point operations of matrix products and convolutions; a multiplication and an
    addition are two.
    """
    few = x[:MEASURED_IMAGES]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        state.flow(few, torch.full(few.shape, 0.5, device=x.device))
    counts = {
        name: sum(operations.values()) for name, operations in forward.get_flop_counts().items()
    }
    conditioners = sum(count for name, count in counts.items() if name.endswith(".conditioner"))
    own_counts = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own_counts) as step:
        train_step(_with_memory(state, "store"), few)  # what is computed again is not counted
    state.zero_grad()
    total = max(1, forward.get_total_flops())
    console.print(
        f"compute: {total / len(few) / 1e9:.4g} GFLOP of products and convolutions for the "
        f"likelihood of an image, "
        f"{100 * conditioners / total:.1f}% of it in conditioners; "
        f"{step.get_total_flops() / len(few) * len(x) / 1e9:.4g} GFLOP a training step"
    )


def _print_parameters(flow: Flow) -> None:
    total = sum(p.numel() for p in flow.parameters())
    console.print(f"parameters: {total}")
    parts: dict[str, int] = {}
    for module in flow.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own:
            name = type(module).__name__
            parts[name] = parts.get(name, 0) + own
    for name, count in sorted(parts.items(), key=lambda part: -part[1]):
        console.print(f"  {name}: {count:,} ({100 * count / total:.1f}%)")

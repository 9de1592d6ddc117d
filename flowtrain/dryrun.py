"""`train --dry-run`: what a run will cost, from random pixels, so that nothing is downloaded or written."""

import dataclasses
import functools
import time
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowtrain import checkpoint
from flowtrain.capacity import available, peak
from flowtrain.config import Config
from flowtrain.console import console, duration
from flowtrain.data import DataSet
from flowtrain.dequantize import draw_noise
from flowtrain.device import Stream, generator
from flowtrain.flow import Flow, initialize
from flowtrain.memory import Mode
from flowtrain.optim import Average, build_optimizers
from flowtrain.state import State
from flowtrain.train import optimizer_step, train_step

TIMED_STEPS = 3
MEASURED_IMAGES = 8  # activations are in proportion to the batch
MIB = 2**20


def dry_run(config: Config, device: torch.device) -> None:
    """Prints the parameters, the memory and the speed of a run. Raises `UserError` where it could not start."""
    data = DataSet(config.data)
    flow = checkpoint.build_flow(config, data.shape, data.levels).to(device)
    _print_parameters(flow)

    train = config.train
    batch = train.batch_size * train.accumulate
    random = generator(config.seed, Stream.ORDER)
    labels = torch.arange(batch, device=device) % flow.classes if flow.classes else None
    if data.levels is None:
        x = torch.randn(batch, *data.shape, generator=random).to(device)
        if flow.latent_dims < flow.dims:
            x = x / x.norm(dim=1, keepdim=True)  # on a surface: the unit sphere
    else:
        x = torch.randint(data.levels, (batch, *data.shape), generator=random, dtype=torch.uint8).to(device)
    initialize(flow, x, draw_noise(x.shape, random, device))
    averaged = Average(flow, train.ema) if train.ema else None
    state = State(config, flow, build_optimizers(flow, train), averaged, {})

    _print_compute(state, x)
    _print_memory(state, x[: train.batch_size], device)

    seconds = []
    for step in range(TIMED_STEPS + 1):
        started = time.perf_counter()
        _, grad_norm = train_step(state, x, labels)
        optimizer_step(state, grad_norm)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step > 0:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    per_step = sorted(seconds)[len(seconds) // 2]
    console.print(f"speed: {per_step:.3f} s a step, {batch / per_step:,.0f} images/s (median of {TIMED_STEPS} steps)")
    if train.num_steps is not None:
        console.print(
            f"estimated time: {duration(per_step * train.num_steps)} for {train.num_steps:,} steps, validation apart"
        )
    else:
        assert train.budget is not None
        steps = train.budget / per_step
        console.print(f"estimated steps: {steps:,.0f} in {duration(train.budget)}, validation apart")


def _with_memory(state: State, mode: Mode) -> State:
    train = state.config.train.model_copy(update={"memory": mode})
    return dataclasses.replace(state, config=state.config.model_copy(update={"train": train}))


def _print_memory(state: State, x: torch.Tensor, device: torch.device) -> None:
    """What each mode of `train.memory` takes at this batch size, and the largest batch that would fit."""
    chosen = state.config.train
    # Weights, gradients, the optimizer's two averages, and the weights' own.
    copies = 1 + 1 + 2 + (state.average is not None)
    gradients = sum(p.numel() * p.element_size() for p in state.flow.parameters())
    free = available(device)
    left = free - (copies - 1) * gradients  # the weights are there already
    console.print(
        f"memory: {copies * gradients / MIB:,.0f} MiB for weights, gradients and optimizer, and for activations, "
        f"with {free / MIB:,.0f} MiB available:"
    )
    few = x[:MEASURED_IMAGES]
    for mode in get_args(Mode):
        step = functools.partial(train_step, _with_memory(state, mode), few)
        step()  # makes what is made once
        state.zero_grad()
        per_image = (peak(step, device) - gradients) / len(few)
        fits = int(max(0, left) / max(1, per_image))
        console.print(
            f"  {mode}: {per_image * len(x) / MIB:,.0f} MiB for {len(x)} images, up to {fits:,} images would fit"
            + (" (chosen)" if mode == chosen.memory else "")
        )


def _print_compute(state: State, x: torch.Tensor) -> None:
    """Floating-point operations of matrix products and convolutions; a multiplication and an addition are two."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        state.flow(x, torch.full(x.shape, 0.5, device=x.device))
    counts = {name: sum(operations.values()) for name, operations in forward.get_flop_counts().items()}
    conditioners = sum(count for name, count in counts.items() if name.endswith(".conditioner"))
    with FlopCounterMode(display=False) as step:
        train_step(_with_memory(state, "store"), x)  # what is computed again is not counted
    state.zero_grad()
    total = max(1, forward.get_total_flops())
    image = total / len(x) / 1e9
    console.print(
        f"compute: {image:.4g} GFLOP for the likelihood of an image, {100 * conditioners / total:.1f}% of it in "
        f"conditioners; {step.get_total_flops() / 1e9:.4g} GFLOP a training step"
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

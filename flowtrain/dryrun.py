"""`train --dry-run`: what a run will cost, from random pixels, so that nothing is downloaded or written."""

import time

import torch

from flowtrain import checkpoint
from flowtrain.config import Config
from flowtrain.console import console, duration
from flowtrain.data import DataSet
from flowtrain.dequantize import draw_noise
from flowtrain.device import Stream, generator
from flowtrain.flow import Flow, initialize
from flowtrain.optim import average, build_optimizer
from flowtrain.state import State
from flowtrain.train import train_step

TIMED_STEPS = 3
MIB = 2**20


def dry_run(config: Config, device: torch.device) -> None:
    """Prints the parameters, the memory and the speed of a run. Raises `UserError` where it could not start."""
    data = DataSet(config.data)
    flow = checkpoint.build_flow(config, data.shape, data.levels).to(device)
    _print_parameters(flow)

    train = config.train
    batch = train.batch_size * train.accumulate
    random = generator(config.seed, Stream.ORDER)
    x = torch.randint(data.levels, (batch, *data.shape), generator=random, dtype=torch.uint8).to(device)
    initialize(flow, x, draw_noise(x.shape, random, device))
    averaged = average(flow, train.ema) if train.ema else None
    state = State(config, flow, build_optimizer(flow, train), averaged, {})

    kept: dict[int, int] = {}  # the bytes of each tensor that the backward pass needs, by its storage

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        train_step(state, x[: train.batch_size])
    for parameter in flow.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    copies = 1 + 1 + 2 + (averaged is not None)  # weights, gradients, the optimizer's two averages, their own average
    weights = copies * sum(p.numel() * p.element_size() for p in flow.parameters())
    activations = sum(kept.values())
    console.print(
        f"memory: {(weights + activations) / MIB:,.0f} MiB: {weights / MIB:,.0f} for weights, gradients and optimizer, "
        f"{activations / MIB:,.0f} for the activations of {train.batch_size} images"
    )

    seconds = []
    for step in range(TIMED_STEPS + 1):
        started = time.perf_counter()
        train_step(state, x)
        state.optimizer.step()
        if averaged is not None:
            averaged.update_parameters(flow)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step > 0:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    per_step = sorted(seconds)[len(seconds) // 2]
    if device.type == "cuda":
        console.print(f"peak memory on {device}: {torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB")
    console.print(f"speed: {per_step:.3f} s a step, {batch / per_step:,.0f} images/s (median of {TIMED_STEPS} steps)")
    if train.num_steps is not None:
        console.print(
            f"estimated time: {duration(per_step * train.num_steps)} for {train.num_steps:,} steps, validation apart"
        )
    else:
        assert train.budget is not None
        steps = train.budget / per_step
        console.print(f"estimated steps: {steps:,.0f} in {duration(train.budget)}, validation apart")


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

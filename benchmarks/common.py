"""What the benchmarks share: the two models, how flowtrain and its peers train them, and timing in
turns.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system.allocator import keep_freed_memory
from flowtrain.system.device import machine
from flowtrain.system.packages import install_command
from flowtrain.training.optim import EMA, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import optimizer_step, train_step

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Work:
    """A Glow on CIFAR-10 shapes: affine couplings, 3x3-1x1-3x3 conditioners, 1x1 convolutions and
    ActNorm.
    """

    steps: int  # K, of flow per level
    width: int
    batch_size: int
    levels: int = 3


WORK = {"S": Work(steps=8, width=128, batch_size=32), "P": Work(steps=32, width=512, batch_size=8)}


def arguments(description: str, **defaults: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--threads", type=int, default=os.cpu_count(), help="threads of one operation")
    add("--repeats", type=int, default=7, help="times that each contender is timed, in turns")
    for name, default in defaults.items():
        add(f"--{name}", default=default)
    memory = "freed memory is kept, as by flowtrain's commands"
    add("--malloc", choices=("kept", "default"), default="kept", help=memory)
    return parser


def begin(title: str, options: argparse.Namespace) -> None:
    """Sets threads and allocator, the same for all contenders, and prints the heading."""
    torch.set_num_threads(options.threads)
    memory = "as the C library does"
    if options.malloc == "kept":
        keep_freed_memory()
        memory = "kept"
    heading(f"{title}; freed memory {memory}", options.threads)


def heading(title: str, threads: int) -> None:
    """The table's title, with the machine and the versions."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    names = [name for name in ("torch", "flowtrain", "normflows", "nflows") if name in installed]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in names]
    where = f"{machine(torch.device('cpu'))}, {os.cpu_count()} cores, {threads} threads"
    print(f"### {title}\n\n{where}; {', '.join(versions)}\n", flush=True)


def in_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call. The contenders take turns, so that a slow moment of the machine affects
    all of them.
    """
    for run in contenders.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: Mapping[str, list[float]], against: Mapping[str, str]) -> None:
    """Prints one row per contender: the median, the least, and the median ratio to each of
    `against` (title to contender).
    """
    rows = []
    for name, times in seconds.items():
        row = [name, f"{statistics.median(times):.3f}", f"{min(times):.3f}"]
        for other in against.values():
            # The median of ratios of neighbours in time: a disturbance of both cancels.
            pairs = zip(times, seconds[other], strict=True)
            row.append(f"{statistics.median(mine / theirs for mine, theirs in pairs):.2f}")
        rows.append(row)
    markdown(["", "median (s)", "least", *against], rows)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table."""
    for row in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def flowtrain(*words: str) -> None:
    """Runs a command as a user does. What it prints goes to standard error."""
    subprocess.run([sys.executable, "-m", "flowtrain", *words], check=True, stdout=sys.stderr)


def pyplot() -> Any:
    """matplotlib.pyplot, which draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def images(count: int) -> Tensor:
    """Smooth random images, uint8. A data-dependent initialization needs correlated pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (fine * 230 + 25 * torch.rand(fine.shape, generator=generator)).to(torch.uint8)


# --- flowtrain ------------------------------------------------------------------------------------


# What the peers' examples do, but with clipping, which costs a little time.
AS_PEERS = {"optimizer": "adam", "lr": 1e-3, "warmup_steps": 0, "schedule": "constant"}
AS_PEERS |= {"clip_norm": 1.0}


def flow_of(config: Config) -> Flow:
    """A flow after data-dependent initialization."""
    flow = build_flow(config, SHAPE, 256)
    x = images(64)
    initialize(flow, x, draw_noise(x.shape, None, x.device))
    return flow


def state_of(config: Config) -> State:
    """An initialized flow with its optimizer and average."""
    flow = flow_of(config)
    ema = EMA(flow, config.train.ema) if config.train.ema else None
    return State(config, flow, build_optimizers(flow, config.train), ema, {})


def flowtrain_state(work: Work, **train: object) -> State:
    options = {"num_steps": 1000, "batch_size": work.batch_size, **AS_PEERS, **train}
    model = {"name": "glow", "levels": work.levels, "steps": work.steps, "width": work.width}
    values = {"data": {"name": "cifar10"}, "model": model, "train": options}
    return state_of(configuration.parse(values, "benchmark"))


def flowtrain_step(state: State, x: Tensor) -> None:
    """One full step: dequantize, log-likelihood, backward, clip, Adam, average."""
    _, grad_norm = train_step(state, x)
    optimizer_step(state, grad_norm)


# --- the floor ------------------------------------------------------------------------------------


def floor(work: Work, dtype: torch.dtype, channels_last: bool, product: bool) -> Callable[[], None]:
    """The convolutions of all conditioners with their biases, forward and backward, and nothing
    else. No training step can be faster.

    `product` computes the 1x1 convolution as a matrix product over all pixels.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape: int) -> Tensor:
        values = (0.05 * torch.randn(shape)).to(dtype)
        return values.contiguous(memory_format=layout) if len(shape) == 4 else values

    convolutions = []
    for level in range(work.levels):
        channels, side, width = 12 * 2**level, 16 // 2**level, work.width
        half = channels // 2
        for _ in range(work.steps):
            weights = [(width, half, 3, 3), (width, width, 1, 1), (channels, width, 3, 3)]
            shapes = [shape for weight in weights for shape in (weight, weight[:1])]
            leaves = [tensor(*shape).requires_grad_() for shape in shapes]
            leaves.append(tensor(work.batch_size, half, side, side).requires_grad_())
            convolutions.append((leaves, tensor(work.batch_size, channels, side, side)))

    def run() -> None:
        outputs = []
        for leaves, grad in convolutions:
            for leaf in leaves:
                leaf.grad = None
            w1, b1, w2, b2, w3, b3, x = leaves
            h = torch.nn.functional.conv2d(x, w1, b1, padding=1)
            if product:
                h = torch.nn.functional.linear(h.movedim(1, -1), w2.flatten(1), b2).movedim(-1, 1)
            else:
                h = torch.nn.functional.conv2d(h, w2, b2)
            outputs.append((torch.nn.functional.conv2d(h, w3, b3, padding=1), grad))
        # Backward from the last to the first, after all forward passes, as in any training step.
        while outputs:
            output, grad = outputs.pop()
            output.backward(grad)

    return run


def fastest_floor(
    work: Work, dtype: torch.dtype, repeats: int = 3
) -> tuple[str, Callable[[], None]]:
    """The name of the fastest layout, and its floor."""
    variants = {}
    for layout, channels_last in (("NCHW", False), ("channels_last", True)):
        for kind, product in (("", False), (", 1x1 as a product", True)):
            variants[layout + kind] = floor(work, dtype, channels_last, product)
    seconds = in_turns(variants, repeats, warmup=1)
    for name, times in seconds.items():
        print(
            f"- floor in {str(dtype).removeprefix('torch.')}, {name}: "
            f"{statistics.median(times):.3f} s"
        )
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return best, variants[best]


# --- peers ----------------------------------------------------------------------------------------


class Peer:
    """The same model in another package, with the step that its users would write: float32, NCHW,
    and fused Adam.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        log_prob: Callable[[Tensor], Tensor],
        sample: Callable[[int], object],
    ):
        self.model = model
        self.log_prob = log_prob
        self.sample = torch.no_grad()(sample)
        with torch.no_grad():
            log_prob(self.dequantize(images(64)))  # sets ActNorm
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)

    @staticmethod
    def dequantize(x: Tensor) -> Tensor:
        return (x + torch.rand(x.shape)) / 256 - 0.5

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (-self.log_prob(self.dequantize(x)).mean() / (math.prod(SHAPE) * math.log(2))).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)


def peers(work: Work) -> dict[str, Peer]:
    """The peers that are installed (the `bench` extra)."""
    found = {}
    for name, build in (("normflows", _normflows), ("nflows", _nflows)):
        try:
            found[name] = build(work)
        except ImportError:
            print(f"- {name} is not installed: {install_command(name)}")
    return found


def _normflows(work: Work) -> Peer:
    import normflows as nf

    bases, merges, flows = [], [], []
    for level in range(work.levels):  # The order is latent to data: the coarsest level is first.
        channels = 3 * 2 ** (work.levels + 1 - level)
        blocks = [
            nf.flows.GlowBlock(channels, work.width, split_mode="channel", scale=True, leaky=0.0)
            for _ in range(work.steps)
        ]
        flows.append([*blocks, nf.flows.Squeeze()])
        side = SHAPE[1] // 2 ** (work.levels - level)
        if level > 0:
            merges.append(nf.flows.Merge())
            bases.append(nf.distributions.DiagGaussian((channels // 2, side, side)))
        else:
            bases.append(nf.distributions.DiagGaussian((channels, side, side)))
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return Peer(model, lambda x: model.log_prob(x, None), model.sample)


def _nflows(work: Work) -> Peer:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow as NFlow
    from nflows.transforms import (
        ActNorm,
        AffineCouplingTransform,
        CompositeTransform,
        MultiscaleCompositeTransform,
        OneByOneConvolution,
        SqueezeTransform,
    )
    from torch import nn

    class Conditioner(nn.Sequential):
        def __init__(self, inputs: int, outputs: int):
            super().__init__(
                nn.Conv2d(inputs, work.width, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(work.width, work.width, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(work.width, outputs, 3, padding=1),
            )

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(x)

    channels, side = SHAPE[:2]
    multiscale = MultiscaleCompositeTransform(work.levels)
    for _level in range(work.levels):
        channels, side = 4 * channels, side // 2
        layers: list[nn.Module] = [SqueezeTransform()]
        for _step in range(work.steps):
            mask = torch.ones(channels)
            mask[channels // 2 :] = -1
            layers += [
                ActNorm(channels),
                OneByOneConvolution(channels),
                AffineCouplingTransform(mask, Conditioner),
            ]
        shape = multiscale.add_transform(CompositeTransform(layers), (channels, side, side))
        if shape is not None:
            channels = shape[0]
    model = NFlow(multiscale, StandardNormal([math.prod(SHAPE)]))
    return Peer(model, model.log_prob, model.sample)

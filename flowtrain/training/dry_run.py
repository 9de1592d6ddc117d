"""`train --dry-run`: the cost of a run, measured with random data, without writing anything."""

import dataclasses
import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flowtrain.bijections.memory import Mode
from flowtrain.checkpoints.background import memory_of_copy
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config
from flowtrain.data.splits import DataSet, labels_for
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import distributed
from flowtrain.system.capacity import left, moments
from flowtrain.system.device import synchronize
from flowtrain.training.optim import EMA, build_optimizers, copies_of_weights
from flowtrain.training.state import State
from flowtrain.training.step import (
    dequantization_noise,
    optimizer_step,
    reason_against,
    require_images_to_fit,
    require_trainable,
    train_step,
)

TIMED_STEPS = 3
INITIALIZED_IMAGES = 16  # at most, because a pass of many images takes long
MEASURED_IMAGES = 4  # the memory of any batch size follows from a few, half of this or larger
DOUBLED = 1.9  # memory that grows by this factor for twice the images has grown in proportion
# The attention of a CPU, which torch does not count. As on a GPU, masked products count.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
ATTENTION = {
    getattr(torch.ops.aten, _KERNEL): lambda *sizes, **_: sdpa_flop_count(*sizes[:3]),
    getattr(torch.ops.aten, f"{_KERNEL}_backward"): (
        lambda *sizes, **_: sdpa_backward_flop_count(*sizes[:4])
    ),
}


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of matrix products and convolutions, two for a multiplication and
    an addition. Recomputation by `train.memory` does not count.
    """

    image_flops: float  # the likelihood of one image, given its class if the model has classes
    conditioners: float  # the share of conditioners in that, 0 to 1
    step_flops: float  # a training step


@dataclass(frozen=True)
class Activations:
    """Memory for one mode of `train.memory`, beside `Memory.fixed_bytes`."""

    mode: Mode
    needed_bytes: float  # at the configured batch size
    largest_batch: int  # that would fit


@dataclass(frozen=True)
class Memory:
    fixed_bytes: int  # weights, gradients, the average of the weights and the optimizer's state
    available_bytes: int  # to this process
    copy_bytes: int  # the copy of a checkpoint that is written in the background, on the host
    modes: list[Activations]


@dataclass(frozen=True)
class Growth:
    """Bytes of a step beyond the gradients, `constant + per_image * images` at each of its moments.

    The moment of the peak depends on the number of images. With few, it may be one with all
    gradients of a level, and with many another, with the activations.
    """

    constant: Tensor
    per_image: Tensor

    @classmethod
    def between(cls, sizes: Sequence[Sequence[int]], images: int) -> "Growth":
        """From the moments with `images` images, with twice as many, and so on.

        The smallest growth between two sizes counts: larger ones include scratch memory, which
        kernels take in blocks.
        """
        moments = torch.tensor(sizes, dtype=torch.float64)
        growth = moments.diff(dim=1, prepend=torch.zeros(len(moments), 1)).diff(dim=0)
        growth /= images * 2 ** torch.arange(len(growth))[:, None]
        per_image = growth.gather(0, growth.abs().argmin(0, keepdim=True))[0].cumsum(0)
        return cls(moments[-1] - images * 2 ** len(growth) * per_image, per_image)

    def of(self, images: int) -> float:
        return float((self.constant + self.per_image * images).max())

    def largest(self, free: int) -> int:
        """How many images at most take no more than `free` bytes."""
        if self.of(0) > free:
            return 0
        grows = self.per_image > 0
        most = (free - self.constant[grows]) / self.per_image[grows]
        return int(most.min()) if len(most) else 0


@dataclass(frozen=True)
class Cost:
    parameters: dict[str, int]  # by class of module, the largest number first
    compute: Compute
    memory: Memory
    step_seconds: float | None  # None if a batch would not fit into memory, or see `dry_run`
    images: int  # per step, of all processes
    compile_seconds: float | None = None  # before the first step; None if nothing is compiled


def dry_run(config: Config, device: torch.device) -> Cost:
    """Measures a run without starting it. Raises `UserError` if it could not start.

    If the run needs a CUDA device (`train.cuda_graph`) and this is another, no step is timed.
    """
    elsewhere = config.train.cuda_graph and device.type != "cuda"
    if elsewhere:
        train = config.train.model_copy(update={"compile": "off", "cuda_graph": False})
        config = config.model_copy(update={"train": train})
    with distributed.main_process_first():  # it may list a large folder
        data = DataSet(config.data)
    train = config.train
    batch = train.batch_size * train.accumulate
    state = prepared(config, data, device)

    plain = _changed(state, compile="off", cuda_graph=False)
    compute = _compute(plain, batch)
    memory = _memory(plain, train.batch_size, device)
    chosen = next(each for each in memory.modes if each.mode == train.memory)
    fits = all(distributed.all_gather_object(chosen.largest_batch >= train.batch_size))
    seconds = seconds_of_a_step(state, batch) if fits and not elsewhere else None
    images = batch * distributed.world()
    compiling = state.compile_seconds or None
    return Cost(_parameters(state.flow), compute, memory, seconds, images, compiling)


def prepared(config: Config, data: DataSet, device: torch.device) -> State:
    """A new run, initialized with random images. Raises `UserError` if it could not start."""
    train = config.train
    flow = build_flow(config, data.shape, data.num_bins, copies_of_weights(train, device)).to(
        device
    )
    require_trainable(flow, config, device)
    _require_labels(data, config.model.classes)
    require_images_to_fit(flow, config, device)
    batch = train.batch_size * train.accumulate
    some, _ = _batch(flow, min(batch, flow.initialization_images, INITIALIZED_IMAGES))
    initialize(flow, some, dequantization_noise(config, 0, some))
    ema = EMA(flow, train.ema) if train.ema else None
    return State(config, flow, build_optimizers(flow, train), ema, {})


def _require_labels(data: DataSet, classes: int) -> None:
    """Raises `UserError` for labels that training refuses. They are not read if the images would
    have to be downloaded or decoded first.
    """
    images = data.train_images
    if classes and (images.labels is None or images.at_hand()):
        labels = None if images.labels is None else torch.from_numpy(images.labels())
        labels_for(classes, labels, data.config.name)


def _batch(flow: Flow, count: int) -> tuple[Tensor, Tensor | None]:
    """Random images in place of the data, `(count, C, H, W)`, and their classes, as in training."""
    x = flow.kind.random((count, *flow.shape), torch.Generator().manual_seed(0))
    labels = flow.classes_in_turn(count)
    return x.to(flow.device), None if labels is None else labels.to(flow.device)


def _parameters(flow: Flow) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for module in flow.modules():
        if own := sum(p.numel() for p in module.parameters(recurse=False)):
            counts[type(module).__name__] += own
    return dict(counts.most_common())


def _compute(state: State, batch: int) -> Compute:
    few, labels = _batch(state.flow, min(batch, MEASURED_IMAGES))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as forward:
        state.flow(few, torch.full(few.shape, 0.5, device=few.device), labels)
    conditioners = sum(
        sum(operations.values())
        for name, operations in forward.get_flop_counts().items()
        if name.endswith(".conditioner")
    )
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as step:
        train_step(_changed(state, memory="store", optimizers=[]), few, labels)
    state.zero_grad()
    total = max(1, forward.get_total_flops())
    of_a_step = step.get_total_flops() / len(few) * batch
    return Compute(total / len(few), conditioners / total, of_a_step)


def _memory(state: State, batch_size: int, device: torch.device) -> Memory:
    """Measured with a few images, also for a batch that would not fit."""
    _, grad_norm = train_step(state, *_batch(state.flow, min(batch_size, MEASURED_IMAGES)))
    optimizer_step(state, grad_norm)  # makes the optimizers' state
    gradients = sum(p.nbytes for p in state.flow.parameters())
    states = [each for optimizer in state.optimizers for each in optimizer.state.values()]
    kept = [tensor for each in states for tensor in each.values()]
    kept += [] if state.ema is None else state.ema.flow.parameters()
    free = left(device)  # for the activations and the copy
    copy = memory_of_copy(state.tensors(), left(torch.device("cpu")))
    of_copy = copy if device.type == "cpu" else 0
    modes = []
    for mode in get_args(Mode):
        if reason_against(state.flow, mode, state.config.train.precision) is None:
            growth = _growth(state, mode, batch_size, device, free)
            needed = max(distributed.all_gather_object(growth.of(batch_size)))
            largest = min(distributed.all_gather_object(growth.largest(free - of_copy)))
            modes.append(Activations(mode, needed, largest))
    state.zero_grad()
    return Memory(2 * gradients + sum(t.nbytes for t in kept), free, copy, modes)


def _changed(
    state: State, optimizers: list[torch.optim.Optimizer] | None = None, **keys: object
) -> State:
    """The state with other keys of `train`. Without optimizers, gradients stay and add up."""
    train = state.config.train.model_copy(update=keys)
    return dataclasses.replace(
        state,
        config=state.config.model_copy(update={"train": train}),
        optimizers=state.optimizers if optimizers is None else optimizers,
    )


def _growth(state: State, mode: Mode, batch_size: int, device: torch.device, free: int) -> Growth:
    """The memory of a step in this mode, from a few batch sizes.

    If all steps have the same moments, any three sizes suffice. Otherwise only the peaks are
    compared, and the size doubles until the images outweigh the rest, such as copies of weights, in
    two of them, or until no more fit.
    """
    size = math.ceil(min(MEASURED_IMAGES, batch_size) / 2)
    found = [_moments_of_a_step(state, mode, size, device)]
    if any(distributed.all_gather_object(2 * max(found[0]) > free)):  # twice as many might not fit
        return Growth(torch.zeros(1), torch.tensor([max(found[0]) / size]))
    outweighed = False
    while True:
        found = [*found[-2:], _moments_of_a_step(state, mode, 2 * size, device)]
        few, many = (max(each) for each in found[-2:])
        aligned = len({len(each) for each in found}) == 1 < len(found[0])
        known = aligned and len(found) == 3 or outweighed
        # all of them measure the same sizes
        if any(distributed.all_gather_object(2 * many > free)) or all(
            distributed.all_gather_object(known)
        ):
            break
        outweighed = many > DOUBLED * few
        size *= 2
    if aligned:
        return Growth.between(found, 2 * size // 2 ** (len(found) - 1))
    return Growth.between([[few], [many]], size)


def _moments_of_a_step(state: State, mode: Mode, count: int, device: torch.device) -> list[int]:
    changed = _changed(state, memory=mode, batch_size=count, optimizers=[])
    step = functools.partial(train_step, changed, *_batch(state.flow, count))
    step()  # creates what later steps reuse
    return moments(step, device)


def seconds_of_a_step(state: State, batch: int) -> float:
    """The median of `TIMED_STEPS` steps, by the clock of `train.budget`."""
    x, labels = _batch(state.flow, batch)
    train = state.config.train
    wall = train.clock == "wall" or train.budget is None
    now = time.perf_counter if wall else time.process_time  # of all threads
    seconds = []
    for step in range(TIMED_STEPS + 1):
        started = now()
        _, grad_norm = train_step(state, x, labels)
        optimizer_step(state, grad_norm)
        synchronize(x.device)
        if step > 0:  # the first one warms up
            seconds.append(now() - started)
    return statistics.median(seconds)

"""One training step: the noise, the gradient, and the update of the weights."""

import contextlib
import math

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.memory import Mode, executor_of
from flowtrain.config import Config
from flowtrain.errors import UserError
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow
from flowtrain.system import distributed
from flowtrain.system.device import send
from flowtrain.system.random import Stream, generator
from flowtrain.training.state import State

NOISE_BLOCK = 512  # images whose noise comes from one generator


def train_step(state: State, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the gradient of a batch's mean loss (see `Flow.loss`).

    `x` are this process's images of the batch, `accumulate` times `batch_size`. Returns the mean
    loss of these images and the norm of the gradient, both 0-dimensional. The gradient is that of
    the whole batch of all processes. The noise depends on the seed and the step alone. With
    `labels` `(B,)` the loss is that of the class-conditional likelihood.
    """
    config = state.config.train
    noise = noise_of(state.config, state.progress.step, x, distributed.rank() * len(x))
    state.zero_grad()
    loss = torch.zeros((), device=x.device)
    left = len(x)
    executor = executor_of(config.memory)
    parts = [x.split(config.batch_size), noise.split(config.batch_size)]
    parts.append([None] * len(parts[0]) if labels is None else labels.split(config.batch_size))
    for part, part_noise, part_labels in zip(*parts, strict=True):
        left -= len(part)
        with distributed.accumulating(state.parallel, more=left > 0):
            with _precision(config.precision, x.device):
                log_prob = state.parallel(part, part_noise, part_labels, executor).total
            part_loss = state.flow.loss(log_prob).sum() / len(x)
            part_loss.backward()
        loss = loss + part_loss.detach()
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    return loss, torch.nn.utils.get_total_norm(gradients)


def optimizer_step(state: State, grad_norm: Tensor) -> None:
    """Clips the gradient to the configured norm, moves the weights, and updates their average."""
    if state.config.train.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(
            state.flow.parameters(), state.config.train.clip_norm, grad_norm
        )
    for optimizer in state.optimizers:
        optimizer.step()
    if state.average is not None:
        state.average.update(state.progress.averaged)
        state.progress.averaged += 1


def noise_of(config: Config, step: int, x: Tensor, start: int) -> Tensor:
    """The noise for `x`, which are images of a step's batch, from its image `start` on.

    The batch is that of all processes. Each block of `NOISE_BLOCK` images has its own generator, so
    a process draws little more than its own part, however many processes there are.
    """
    stop = start + len(x)
    blocks = []
    for block in range(start // NOISE_BLOCK, math.ceil(stop / NOISE_BLOCK)):
        count = min(stop - block * NOISE_BLOCK, NOISE_BLOCK)
        random = generator(config.seed, Stream.DEQUANTIZATION, step, *([block] if block else []))
        blocks.append(draw_noise((count, *x.shape[1:]), random, torch.device("cpu")))
    return send(torch.cat(blocks)[start % NOISE_BLOCK :], x.device)


def _precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 for the conditioners. The data path casts back, and computes its products in float32."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def is_trainable(flow: Flow, memory: Mode, precision: str) -> bool:
    """Whether this memory mode gives the flow right gradients."""
    layers = [module for module in flow.modules() if isinstance(module, Bijection)]
    in_bf16 = memory == "reversible" and precision == "bf16"
    return not in_bf16 or all(layer.reversible_in_bf16 for layer in layers)


def require_trainable(flow: Flow, config: Config) -> None:
    """Raises `UserError` for a memory mode that would give this flow wrong gradients."""
    if not is_trainable(flow, config.train.memory, config.train.precision):
        raise UserError(
            "train.memory: reversible computes the input of an autoregressive layer again in "
            "float32, but its output was computed in bf16: set train.precision=fp32, or another "
            "train.memory"
        )

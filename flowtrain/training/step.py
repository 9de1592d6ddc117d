"""One training step: the noise, the gradient, and the update of the weights."""

import copy

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.memory import Mode, executor_of
from flowtrain.config import Config
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import distributed
from flowtrain.system.capacity import kept, left
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.training.computation import autocast, require_possible
from flowtrain.training.state import State


def train_step(state: State, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the gradient of a batch's mean loss (see `Flow.loss`).

    `x` are this process's images of the batch, `accumulate` times `batch_size`. Returns the mean
    loss of these images and the norm of the gradient, both 0-dimensional. The gradient is that of
    the whole batch of all processes. The noise of an image depends on the seed and on how many
    images the run has used before it. With `labels` `(B,)` the loss is that of the
    class-conditional likelihood, and some labels may be `dropped`.
    """
    config = state.config.train
    position = state.progress.images + distributed.rank() * len(x)
    noise = noise_of(state.config, position, x)
    if labels is not None:
        labels = dropped(state.config, position, labels)
    state.zero_grad()
    loss = torch.zeros((), device=x.device)
    left = len(x)
    parts = [x.split(config.batch_size), noise.split(config.batch_size)]
    parts.append([None] * len(parts[0]) if labels is None else labels.split(config.batch_size))
    for part, part_noise, part_labels in zip(*parts, strict=True):
        left -= len(part)
        loss = loss + state.computation(part, part_noise, part_labels, len(x), more=left > 0)
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    return loss, torch.nn.utils.get_total_norm(gradients)


def optimizer_step(state: State, grad_norm: Tensor) -> None:
    """Clips the gradient to the configured norm, moves the weights, and updates their average.

    A norm that is not finite leaves all of them as they are, and so do the steps after it until
    the state is restored. The host does not wait to know which.
    """
    state.stuck.logical_or_(~torch.isfinite(grad_norm))
    if state.config.train.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(
            state.flow.parameters(), state.config.train.clip_norm, grad_norm
        )
    for optimizer in state.optimizers:
        optimizer.step()
    if state.average is not None:
        state.average.update(state.progress.averaged, state.stuck)
        state.progress.averaged += 1


def noise_of(config: Config, position: int, x: Tensor) -> Tensor:
    """The noise for `x`, a part of a run's whole sequence of images, from its `position` on.

    It does not depend on how the sequence is divided into steps, processes and parts.
    """
    return uniform(x.shape, config.seed, Stream.DEQUANTIZATION, position, device=x.device)


def dropped(config: Config, position: int, labels: Tensor) -> Tensor:
    """The labels `(B,)` with some of them K, which stands for no class (`ClassContext`).

    Each is dropped with the probability `model.label_dropout`. Like the noise, this depends on the
    seed and on the image's place in the run's whole sequence.
    """
    probability, classes = config.model.label_dropout, config.model.classes
    if not probability:
        return labels
    shape = (len(labels), 1)
    draws = uniform(shape, config.seed, Stream.LABELS, position, device=labels.device)
    return torch.where(draws[:, 0] < probability, classes, labels)


def reason_against(flow: Flow, memory: Mode, precision: str) -> str | None:
    """Why this memory mode does not suit the flow, or None if it does."""
    layers = [module for module in flow.modules() if isinstance(module, Bijection)]
    if memory != "reversible":
        return None
    if not all(layer.reversible_in for layer in layers):
        return (
            "reversible saves nothing here: all activations are inside of one layer, whose inverse "
            "computes one entry after the other; use store or checkpoint"
        )
    if not all(precision in layer.reversible_in for layer in layers):
        return (
            "reversible computes the input of an autoregressive layer again in float32, but its "
            "output was computed in bf16: set train.precision=fp32, or another train.memory"
        )
    return None


def require_trainable(flow: Flow, config: Config, device: torch.device) -> None:
    """Raises `UserError` for a way of computing a step that does not suit this flow or device."""
    if reason := reason_against(flow, config.train.memory, config.train.precision):
        raise UserError(f"train.memory: {reason}")
    require_possible(flow, config.train, device)


def activations_of_an_image(flow: Flow, config: Config) -> int:
    """Bytes that the forward pass of a training step keeps for each image, from two small passes.

    The flow may be a new one. A step needs somewhat more at its peak.
    """
    random = generator(config.seed, Stream.ORDER)
    x = flow.kind.random((2, *flow.shape), random)
    noise = noise_of(config, 0, x)
    flow = copy.deepcopy(flow)
    initialize(flow, x.to(flow.device), noise.to(flow.device))
    executor = executor_of(config.train.memory)

    def of(count: int) -> int:
        # Twice the same image, so that a continuous flow takes the same steps.
        of_x, of_noise = (
            each[:1].repeat(count, 1, 1, 1).to(flow.device) for each in (x, noise.to(flow.dtype))
        )
        labels = torch.zeros(count, dtype=torch.int64, device=flow.device) if flow.classes else None
        with autocast(config.train.precision, flow.device):
            return kept(lambda: flow(of_x, of_noise, labels, executor))

    return max(0, of(2) - of(1))


def require_memory(flow: Flow, config: Config, device: torch.device) -> None:
    """Raises `UserError` where a step does not fit into the memory that is left."""
    require_images_to_fit(flow, config, device)  # before two of them pass through the flow
    require_images_to_fit(flow, config, device, activations_of_an_image(flow, config))


def require_images_to_fit(
    flow: Flow, config: Config, device: torch.device, activations: int = 0
) -> None:
    """Raises `UserError` where the images of a step, their noise and their `activations`, bytes for
    each image, do not fit into the memory that is left.
    """
    train = config.train
    free = left(device)
    # For each image. The noise is float32, and is there twice while it is put together.
    held = flow.dims * (8 + (4 if flow.levels is None else 1))
    at_a_time = train.batch_size * (held + activations)
    needed = at_a_time + train.batch_size * (train.accumulate - 1) * held
    if needed <= free:
        return
    key, largest = "train.batch_size", free // (held + activations)
    advice = f"lower it{', or use train.accumulate' if train.accumulate == 1 else ''}"
    if at_a_time <= free:
        key, largest = "train.accumulate", 1 + (free - at_a_time) // (train.batch_size * held)
        advice = "lower it, or train.batch_size"
    elif train.memory != "reversible":
        advice += ", or another train.memory"
    if largest < 1:
        advice = "use smaller images or a smaller model"
    raise UserError(
        f"{key}: a step of {train.batch_size:,} x {train.accumulate:,} images (train.batch_size x "
        f"train.accumulate) needs at least {needed / 2**30:,.1f} GiB for images, noise and "
        f"activations, and {free / 2**30:,.1f} GiB are available: at most {largest:,} would fit; "
        f"{advice}"
    )

"""One training step: the noise, the loss, its gradient, and the update of the weights."""

import copy
import math
import time

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.memory import Mode
from flowtrain.config import Config
from flowtrain.errors import RunError, UserError, cut
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import distributed
from flowtrain.system.capacity import kept, left
from flowtrain.system.console import console, duration
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.training.loss import Batch, Loss, autocast, one_unless_bad, require_possible
from flowtrain.training.state import State

# Largest difference from the plain gradient on the first batch, relative to its norm. Another order
# of rounding changes it by far less, and an error in one layer by more.
TOLERANCE = {"fp32": 1e-2, "bf16": 0.1}


def train_step(state: State, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the gradient of a batch's mean loss (see `Flow.loss`).

    `x` are this process's images of the batch, `accumulate` times `batch_size`. With `labels`
    `(B,)` the likelihood is class-conditional. Returns the mean loss of these images and the norm
    of the gradient, both 0-dimensional. The gradient covers the whole batch of all processes.
    """
    config = state.config.train
    position = state.progress.images + distributed.rank() * len(x)
    noise = dequantization_noise(state.config, position, x)
    if labels is not None:
        labels = drop_labels(state.config, position, labels)
    tensors = [x.split(config.batch_size), noise.split(config.batch_size)]
    tensors.append([None] * len(tensors[0]) if labels is None else labels.split(config.batch_size))
    parts: list[Batch] = list(zip(*tensors, strict=True))
    state.zero_grad()
    if state.compile_seconds is None:
        state.compile_seconds = _check(state, parts[0])
    if state.cuda_graph is not None:
        total = state.cuda_graph(parts, len(x))
        distributed.average(state.cuda_graph.gradients)
    else:
        total = torch.zeros((), device=x.device)
        for count, part in enumerate(parts, start=1):
            with distributed.accumulating(state.loss, more=count < len(parts)):
                loss = state.loss(*part) / len(x)
                loss.backward(one_unless_bad(loss))
            total = total + loss.detach()
            del loss  # its graph, before the next one is there
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    return total, torch.nn.utils.get_total_norm(gradients)


def _check(state: State, batch: Batch) -> float | None:
    """Compares the compiled or replayed loss and its gradient with the plain ones on a batch.

    Returns the seconds that took, with compiling and capturing, or None if the plain loss is not
    finite, which shows nothing.

    Raises:
        UserError: if compiling or capturing fails.
        RunError: if the result differs.
    """
    started = time.perf_counter()
    train, images = state.config.train, len(batch[0])
    parameters = [p for p in state.flow.parameters() if p.requires_grad]
    loss = Loss(state.flow, train)(*batch) / images
    expected = torch.autograd.grad(loss, parameters, materialize_grads=True)
    settings, remedy = f"train.compile={train.compile}", "set train.compile=off"
    if train.cuda_graph:
        settings += ", train.cuda_graph=true"
        remedy += " and train.cuda_graph=false"
    try:
        if state.cuda_graph is not None:
            found_loss = state.cuda_graph([batch], images)
        else:
            with distributed.accumulating(state.loss, more=True):
                found_loss = state.loss(*batch) / images
                found_loss.backward(one_unless_bad(found_loss))
    except Exception as error:  # the same computation has just run without compiling
        reason = str(error).partition("\nSet TORCH")[0]  # advice for torch's developers
        raise UserError(
            f"{settings}: failed: {cut(reason, 300) or type(error).__name__}\n{remedy}; "
            f"compiling needs a C++ compiler such as g++ on a CPU, and a C compiler on a GPU"
        ) from error
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    if not math.isfinite(loss.item()):
        return None
    norm = torch.nn.utils.get_total_norm
    difference = norm([one - other for one, other in zip(found, expected, strict=True)])
    error_of_gradient = difference.item() / (norm(expected).item() or 1.0)
    error_of_loss = abs((found_loss - loss).item()) / max(1.0, abs(loss.item()))
    if not max(error_of_gradient, error_of_loss) <= TOLERANCE[train.precision]:
        raise RunError(
            f"{settings}: the first batch has another gradient than without (by "
            f"{error_of_gradient:.2g} of its norm, the loss by {error_of_loss:.2g}): {remedy}"
        )
    seconds = time.perf_counter() - started
    console.print(
        f"{settings}: ready after {duration(seconds)}; on the first batch the gradient "
        f"is the same within {error_of_gradient:.0e}"
    )
    return seconds


def optimizer_step(state: State, grad_norm: Tensor) -> None:
    """Clips the gradient to the configured norm, moves the weights, and updates their average.

    After a non-finite norm, neither this step nor later ones change anything until the state is
    restored. The host does not wait for the norm, except for `HOST_DECIDES`.
    """
    state.found_inf.logical_or_(~torch.isfinite(grad_norm))
    if state.unless is None and state.found_inf.item():
        return
    if state.config.train.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(
            state.flow.parameters(), state.config.train.clip_norm, grad_norm
        )
    for optimizer in state.optimizers:
        optimizer.step()
    if state.ema is not None:
        state.ema.update(state.progress.averaged, state.unless)
        state.progress.averaged += 1


def dequantization_noise(config: Config, position: int, x: Tensor) -> Tensor:
    """The noise for `x`, at `position` in the sequence of all images of a run. It does not depend
    on how the sequence is divided into steps, processes and parts.
    """
    return uniform(x.shape, config.seed, Stream.DEQUANTIZATION, position, device=x.device)


def drop_labels(config: Config, position: int, labels: Tensor) -> Tensor:
    """The labels `(B,)`, where each is dropped with probability `model.label_dropout`: it becomes
    K, for no class (`ClassContext`). Like the noise, this depends on the seed and the position.
    """
    probability, classes = config.model.label_dropout, config.model.classes
    if not probability:
        return labels
    shape = (len(labels), 1)
    draws = uniform(shape, config.seed, Stream.LABELS, position, device=labels.device)
    return torch.where(draws[:, 0] < probability, classes, labels)


def reason_against(flow: Flow, memory: Mode, precision: str) -> str | None:
    """Why this memory mode does not suit the flow, or None if it does."""
    if memory != "reversible":
        return None
    layers = [module for module in flow.modules() if isinstance(module, Bijection)]
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
    """Raises `UserError` if the keys of `train` do not suit this flow or device."""
    if reason := reason_against(flow, config.train.memory, config.train.precision):
        raise UserError(f"train.memory: {reason}")
    if config.train.clock == "processor" and device.type != "cpu":
        raise UserError(f"train.clock: processor time does not measure steps on {device}; use wall")
    require_possible(flow, config.train, device)


def activations_of_an_image(flow: Flow, config: Config) -> int:
    """Bytes that the forward pass of a training step keeps for each image, from two small passes of
    a flow that may be a new one. The peak of a step is somewhat higher. If two images do not fit
    into the memory that is left, the number is only known to be more than half of that.
    """
    random = generator(config.seed, Stream.ORDER)
    x = flow.kind.random((2, *flow.shape), random)
    noise = dequantization_noise(config, 0, x)
    flow = copy.deepcopy(flow)
    initialize(flow, x.to(flow.device), noise.to(flow.device))
    executor = Loss(flow, config.train).executor

    def of(count: int) -> int:
        # Twice the same image, so that a continuous flow takes the same steps.
        of_x, of_noise = (
            each[:1].repeat(count, 1, 1, 1).to(flow.device) for each in (x, noise.to(flow.dtype))
        )
        labels = torch.zeros(count, dtype=torch.int64, device=flow.device) if flow.classes else None
        with autocast(config.train.precision, flow.device):
            return kept(lambda: flow(of_x, of_noise, labels, executor), half)

    half = left(flow.device) // 2
    one = of(1)
    return one if one > half else max(0, of(2) - one)


def require_memory(flow: Flow, config: Config, device: torch.device) -> None:
    """Raises `UserError` if a step does not fit into the memory that is left."""
    require_images_to_fit(flow, config, device)  # before two of them pass through the flow
    require_images_to_fit(flow, config, device, activations_of_an_image(flow, config))


def require_images_to_fit(
    flow: Flow, config: Config, device: torch.device, activations: int = 0
) -> None:
    """Raises `UserError` if the images of a step, their noise and their `activations` (bytes for
    each image) do not fit into the memory that is left.
    """
    train = config.train
    free = left(device)
    # For each image. The noise is float32, and is there twice while it is put together.
    held = flow.dims * (8 + (4 if flow.num_bins is None else 1))
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

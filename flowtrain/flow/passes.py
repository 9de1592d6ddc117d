"""A pass through a flow without gradients: its modules, and how many images it takes at a time."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowtrain.bijections.execution import LayerByLayer
from flowtrain.flow.flow import Flow
from flowtrain.system import capacity

# Bytes of activations. A larger batch is no faster on a CPU (docs/lab/performance.md).
ENOUGH_FOR_A_CPU = 256 * 2**20
LARGEST_BATCH = 2048  # so that progress can be seen
# Activations in memory at a time, as a multiple of the largest one: the input and output of a
# convolution, and copies of them.
ALIVE = 6


@torch.no_grad()
def watch_modules(
    flow: Flow, x: Tensor, noise: Tensor, note: Callable[[str, nn.Module, Any], None]
) -> None:
    """Calls `note(name, module, output)` for each module, also in networks, in a forward pass."""
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: note(name, module, output)
        )
        for name, module in flow.named_modules()
    ]
    try:
        flow(x, noise, executor=LayerByLayer())
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def largest_activation(flow: Flow) -> int:
    """Bytes of the largest output of a module for one image."""
    largest = 0

    def note(name: str, module: nn.Module, output: Any) -> None:
        nonlocal largest
        largest = max([largest, *(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))])

    x = flow.example()
    watch_modules(flow, x, torch.full_like(x, 0.5, dtype=flow.dtype), note)
    return largest


def fitting_batch_size(flow: Flow) -> int:
    """The number of images to score at a time, a power of two.

    On a GPU they fit into a quarter of all memory, not of the free memory: the last digits of a
    likelihood depend on the batch size, and should be the same the next time. On a CPU speed is the
    limit, long before memory.
    """
    budget: float = ENOUGH_FOR_A_CPU
    if flow.device.type == "cuda":
        budget = torch.cuda.get_device_properties(flow.device).total_memory / 4
    return _power_of_two(budget / (ALIVE * largest_activation(flow)))


def sampling_batch_size(flow: Flow) -> int:
    """The number of images to decode at a time, a power of two.

    It is `fitting_batch_size`, so that rounding is the same the next time, or less if memory is
    short. For a sequential inverse on a CPU a quarter of all memory is filled, because each entry
    takes long however few images there are.
    """
    largest = fitting_batch_size(flow)
    of_an_image = ALIVE * largest_activation(flow)
    if flow.bijection.inverse_is_sequential and flow.device.type == "cpu":
        largest = _power_of_two(capacity.total() / 4 / of_an_image)
    return min(largest, _power_of_two(capacity.left(flow.device) / 2 / of_an_image))


def denoising_batch_size(flow: Flow) -> int:
    """The number of images to decode and denoise at a time, a power of two."""
    x = flow.example()

    def denoise(images: Tensor) -> Tensor:
        count = len(images)
        context = flow.context_of(x.expand(count, *flow.shape))
        return flow.denoised(images, flow.classes_in_turn(count), context)

    return gradient_batch_size(flow, denoise, flow.dequantizer.middle(x, flow.dtype))


def gradient_batch_size(flow: Flow, gradient: Callable[[Tensor], object], image: Tensor) -> int:
    """The number of images or latents `(B, ...)` for which to compute a `gradient` at a time, a
    power of two. Memory is measured for `image` `(1, ...)`.
    """

    def of(count: int) -> int:
        # Copies of the same image, so that a continuous flow takes the same steps.
        images = image.expand(count, *image.shape[1:]).clone()
        return capacity.kept(lambda: gradient(images))

    of_an_image = max(1, of(2) - of(1))
    return min(
        sampling_batch_size(flow), _power_of_two(capacity.left(flow.device) / 2 / of_an_image)
    )


def _power_of_two(count: float) -> int:
    """The largest one that is not above `count`, from 1 to `LARGEST_BATCH`."""
    return 1 << int(math.log2(min(max(count, 1), LARGEST_BATCH)))

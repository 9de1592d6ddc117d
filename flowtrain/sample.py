"""Samples at several temperatures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowtrain.device import Stream, generator
from flowtrain.flow import Flow

BATCH_SIZE = 64


def sample(
    flow: Flow,
    num: int,
    temperatures: Sequence[float],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """`num` images for each temperature, from the same latents: uint8 `(len(temperatures) * num, C, H, W)`.

    The latents are drawn on the CPU, image by image: the first ones depend on the seed alone.
    """
    z = flow.draw_latents(num, generator(seed, Stream.LATENTS))
    images = []
    for temperature in temperatures:
        for part in z.split(BATCH_SIZE):
            images.append(flow.decode(temperature * part).cpu())
            progress(sum(map(len, images)), num * len(temperatures))
    return torch.cat(images)

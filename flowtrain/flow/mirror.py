"""The mixture of an image and its mirror image, for models that were trained with flips.

A side of an image is the image itself, or its mirror image. `log(1/2 P(x) + 1/2 P(flip x))` is as
normalized as log P, and as exact. It is larger on average if the model has learned both sides, but
not that they are equally likely.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.flow.class_prior import LogProb, over_classes
from flowtrain.flow.kinds import log_mean_exp

MIXTURE = "the mean over the image and its mirror image"  # what a likelihood is of, for messages


def over_sides(sides: Sequence[LogProb]) -> LogProb:
    """`log(1/2 P(x) + 1/2 P(flip x))` from both sides, and the same given each class."""
    mixed = over_classes(sides)
    by_class = [
        each.by_class + (each.log_det - mixed.log_det)[:, None]
        for each in sides
        if each.by_class is not None
    ]
    return mixed._replace(by_class=log_mean_exp(torch.stack(by_class)) if by_class else None)


def sides_of(noise: Tensor) -> Tensor:
    """Which samples are mirror images, bool `(B,)`: each with probability 1/2.

    It is a function of the bits of the standard normal draws `noise` `(B, D)`. So it needs no draw
    of its own, and samples at several temperatures have the same side.
    """
    rows = noise.float().cpu().numpy()
    return torch.tensor([zlib.crc32(row.tobytes()) % 2 == 1 for row in rows], dtype=torch.bool)


def turn(x: Tensor, sides: Tensor) -> Tensor:
    """Replaces the images of `x` `(B, C, H, W)` at the true `sides` `(B,)` by their mirror images.

    It works in place, one by one, so that it needs no memory, and returns `x`.
    """
    for index in sides.nonzero()[:, 0].tolist():
        x[index] = x[index].flip(-1)
    return x

"""The mixture over the sides of an image, for models that have learned them.

The sides are the image itself and its mirror image (`data.flip`), or all orders of the model
(`model.orders`). `log(1/N sum_k P_k(turned_k(x)))` is as normalized as log P, and as exact. It is
larger on average, because the errors of the model differ from side to side.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.flow.class_prior import LogProb, over_classes
from flowtrain.flow.kinds import log_mean_exp


def mixture(sides: int) -> str:
    """The words of messages for a likelihood over several sides."""
    if sides == 2:
        return "the mean over the image and its mirror image"
    return f"the mean over {sides} orders of the image"


def over_sides(sides: Sequence[LogProb]) -> LogProb:
    """The mixture from the parts of each side, and the same given each class."""
    mixed = over_classes(sides)
    by_class = [
        each.by_class + (each.log_det - mixed.log_det)[:, None]
        for each in sides
        if each.by_class is not None
    ]
    return mixed._replace(by_class=log_mean_exp(torch.stack(by_class)) if by_class else None)


def sides_of(noise: Tensor, sides: int) -> Tensor:
    """The sides of samples, int64 `(B,)`: each of 0 to `sides - 1` is equally likely.

    It is a function of the bits of the standard normal draws `noise` `(B, D)`. So it needs no draw
    of its own, and samples at several temperatures have the same side.
    """
    rows = noise.float().cpu().numpy()
    return torch.tensor([zlib.crc32(row.tobytes()) % sides for row in rows])

"""The orders in which an autoregressive model reads an image: raster order of a turned copy."""

import torch
from torch import Tensor
from torch.nn import functional as F


def turned(x: Tensor, side: int) -> Tensor:
    """Images `(..., H, W)` from one of their sides 0 to 7, a view or a copy.

    The bits of `side` are: mirrored, then upside down, then transposed.
    """
    x = x.flip(-1) if side & 1 else x
    x = x.flip(-2) if side & 2 else x
    return x.transpose(-1, -2) if side & 4 else x


def turned_back(x: Tensor, side: int) -> Tensor:
    """The inverse of `turned`."""
    x = x.transpose(-1, -2) if side & 4 else x
    x = x.flip(-2) if side & 2 else x
    return x.flip(-1) if side & 1 else x


def turn_each(x: Tensor, sides: Tensor, back: bool = False) -> Tensor:
    """Turns the images of `x` `(B, C, H, W)` to `sides` `(B,)`, or `back` from these.

    It works in place, one by one, so that it needs no memory, and returns `x`.
    """
    for index in sides.nonzero()[:, 0].tolist():
        side = int(sides[index])
        x[index] = (turned_back if back else turned)(x[index], side).clone()
    return x


def in_some_order(x: Tensor, u: Tensor, orders: int) -> tuple[Tensor, Tensor]:
    """Images `(B, C, H, W)` turned to orders that their noise `u` in [0, 1] chooses, of the shape
    of `x`, and the context of these orders.
    """
    order = (u[:, 0, 0, 0] * orders).long().clamp(max=orders - 1)
    each = torch.stack([turned(x, side) for side in range(orders)])
    x = each[order, torch.arange(len(x), device=x.device)]
    return x, order_context(order, orders).to(x)


def order_context(order: Tensor, orders: int) -> Tensor:
    """The context `(B, orders - 1)` of orders `(B,)`: zeros for the first one, and unit vectors."""
    return F.one_hot(order, orders)[:, 1:]

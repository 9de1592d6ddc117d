"""The account of an image: exact maps of its bits, by place and level.

The maps add up to the bits of the image, exactly. In a causal flow the terms of a pixel are
`-log P(pixel | all pixels before it)`. In other flows a cell of a level has the density of the
latents that leave there, with the volume that the layers have gained or lost there. This is an
account, and not the probability of the cell.

Terms without a place have numbers of their own: learned noise, and the choice among the classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.evaluation.places import Size, by_place, merged
from flowtrain.flow.flow import Flow
from flowtrain.tools.explore.edits import Stoppable


class OfClass(NamedTuple):
    """The part of the choice among the classes: `log K + log P(k|x)`, for the likeliest class k."""

    label: int
    probability: float  # P(k|x)
    loss: float


@dataclass(frozen=True)
class Accounts:
    """The loss of an image in the unit of the model's kind, bits/dim, and its parts.

    total: as `flowtrain evaluate` computes it, with the noise that was given.
    places: for each size `(H, W)`, the largest first, a map whose mean is that size's part of the
        total. Empty if there is no map.
    noise: the part of learned noise.
    of_class: the part of the classes, in a class-conditional model.
    """

    total: float
    places: dict[Size, Tensor]
    noise: float = 0.0
    of_class: OfClass | None = None

    @property
    def map(self) -> Tensor:
        """All maps in one, `(H, W)`. Each pixel of a cell has the bits of the cell."""
        return merged(self.places, next(iter(self.places)))


@torch.no_grad()
def account(
    flow: Flow, x: Tensor, noise: Tensor, check: Callable[[], None] = lambda: None
) -> Accounts:
    """The accounts of one image `(1, C, H, W)` with uniform noise of that shape.

    `check` is called before each layer, and may raise an exception that ends this.
    """
    parts = flow(x, noise, executor=Stoppable(check))
    total = flow.loss(parts.total).item()
    of_class, labels = None, None
    if parts.by_class is not None:
        shares = parts.by_class.softmax(dim=1)[0]
        labels = shares.argmax(keepdim=True)
        share = shares[labels].clamp_min(torch.finfo(shares.dtype).tiny)
        loss = -flow.loss(share.log() + math.log(flow.classes))
        of_class = OfClass(int(labels), share.item(), loss.item())
    places, of_noise = by_place(flow, x, noise, labels, lambda sums: Stoppable(check, sums))
    # times the cells, so that the mean of a map is its part of the total
    maps = {size: flow.loss(each[0]) * each[0].numel() for size, each in places.items()}
    return Accounts(total, maps, flow.loss(of_noise).item() if maps else 0.0, of_class)

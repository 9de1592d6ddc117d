"""Maps of the bits of an image: exact accounts by place and level.

A flow's log-likelihood is the base density plus log-determinants. The base density is a sum over
the entries of the latent, whose levels are images. Couplings, ActNorms and 1x1 convolutions have
one term for each place, and the dequantization has one for each entry of the image.

So the maps add up to the bits of the image, exactly. In a causal flow the terms of a pixel are
`-log P(pixel | all pixels before it)`. In other flows a cell of a level has the density of the
latents that leave there, with the volume that the layers have gained or lost there. This is an
account, and not the probability of the cell.

Terms without a place have numbers of their own: learned noise, and the choice among the classes. A
model with layers that mix all places, such as an autoregressive flow of vectors, has no map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections import (
    Bijection,
    CheckerboardCoupling,
    Coupling,
    DiagonalAffine,
    OrdinalAutoregressive,
    Permute,
    Squeeze,
)
from flowtrain.bijections.base import Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.execution import LayerByLayer, call
from flowtrain.flow.class_prior import normal_log_density
from flowtrain.flow.flow import Flow
from flowtrain.tools.explore.edits import Stoppable

Size = tuple[int, int]


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
        rows, columns = finest = next(iter(self.places))
        total = torch.zeros(finest)
        for (h, w), each in self.places.items():
            total = total + each.repeat_interleave(rows // h, 0).repeat_interleave(columns // w, 1)
        return total


@singledispatch
def forward_by_place(
    layer: Bijection, x: Tensor, context: Context | None
) -> tuple[Tensor, Tensor] | None:
    """`layer.forward`, with the part of `log_det` that belongs to each place of an image.

    For `x` `(B, C, H, W)` the second result is `(B, H', W')`, and sums to `log_det`. None if
    the log-determinant is no sum over places, or for a kind of layer that is not registered.
    """
    return None


@forward_by_place.register
def _(
    layer: Coupling | CheckerboardCoupling, x: Tensor, context: Context | None
) -> tuple[Tensor, Tensor]:
    z, log_derivative = layer.by_entry(x, context)
    return z, log_derivative.sum(dim=1)


@forward_by_place.register
def _(layer: DiagonalAffine, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    return layer(x)[0], layer.bounded_log_scale().expand_as(x).sum(dim=1)


@forward_by_place.register
def _(layer: LinearChannels, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    return layer(x)[0], layer.log_abs_dets([layer]).expand_as(x[:, 0])


@forward_by_place.register
def _(layer: Squeeze | Permute, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    z = layer(x)[0]
    return z, torch.zeros_like(z[:, 0])


@forward_by_place.register
def _(layer: OrdinalAutoregressive, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    z, log_derivative = layer.by_entry(x, context)
    return z.flatten(1), (log_derivative + math.log(layer.num_bins)).sum(dim=1)


class ByPlace(LayerByLayer):
    """Adds up the log-determinants of each place.

    Attributes:
        places: Sums over the layers at each size `(H, W)`, `(B, H, W)` in nats.
        without: The names of layers whose log-determinant has no places, so is not in `places`.
    """

    def __init__(self) -> None:
        self.places: dict[Size, Tensor] = {}
        self.without: set[str] = set()

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        of_images = direction == "forward" and x.ndim == 4
        result = forward_by_place(layer, x, context) if of_images else None
        if result is None:
            self.without.add(type(layer).__name__)
            return call(layer, direction, x, context)
        z, by_place = result
        _add(self.places, by_place)
        return z, by_place.sum(dim=(1, 2))


def _add(sums: dict[Size, Tensor], values: Tensor) -> None:
    """Adds values `(..., H, W)` to the sum of their size."""
    size = (values.shape[-2], values.shape[-1])
    sums[size] = sums[size] + values if size in sums else values


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
    sums = ByPlace()
    v, by_place, of_noise = flow.dequantizer.forward_by_place(x, noise.to(flow.dtype))
    conditioning = flow.conditioning(len(x), labels, flow.context_of(x))
    z, _ = flow.bijection.run(Stoppable(check, sums), "forward", v, conditioning)
    density = normal_log_density(z)
    if flow.class_prior is not None and labels is not None:
        density = flow.class_prior.log_prob_by_entry(z, labels)
    levels = flow.split_latents(density + flow.dequantizer.of_entry)
    if levels[0].ndim != 4 or sums.without:
        return Accounts(total, {}, of_class=of_class)
    maps: dict[Size, Tensor] = {}
    for part in [by_place, *sums.places.values(), *(level.sum(dim=1) for level in levels)]:
        cells = part[0].numel()  # so that the mean of a map is its part of the total
        _add(maps, flow.loss(part[0].double()).cpu() * cells)
    maps = {size: each for size, each in maps.items() if each.any()}  # a squeeze has only zeros
    ordered = dict(sorted(maps.items(), reverse=True))
    return Accounts(total, ordered, flow.loss(of_noise).item(), of_class)

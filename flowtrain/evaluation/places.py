"""The terms of a flow's likelihood by place: which pixels of an image need how many bits.

A flow's log-likelihood is the base density plus log-determinants. The base density is a sum over
the entries of the latent, whose levels are images. Couplings, ActNorms and 1x1 convolutions have
one term for each place, and the dequantization has one for each entry of the image. A model with
layers that mix all places, such as an autoregressive flow of vectors, has no such terms.
"""

import math
from collections.abc import Callable
from functools import singledispatch

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
from flowtrain.bijections.base import Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.execution import LayerByLayer, call
from flowtrain.flow.class_prior import normal_log_density
from flowtrain.flow.flow import Flow

Size = tuple[int, int]


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


def by_place(
    flow: Flow,
    x: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    executor: Callable[[LayerByLayer], Executor] = lambda sums: sums,
) -> tuple[dict[Size, Tensor], Tensor]:
    """The terms of the bound on log P(x), in nats: first each place by size, then the rest.

    For images `(B, C, H, W)`, uniform noise of that shape, and classes `(B,)` if the model has any,
    there is a float64 tensor `(B, h, w)` on the CPU for each size `(h, w)`, the largest first.
    There is none if the model has a layer without places. The rest is of learned noise,
    `(B,)`. `executor` wraps the one that adds up the terms.
    """
    sums = ByPlace()
    v, of_image, of_noise = flow.dequantizer.forward_by_place(x, noise.to(flow.dtype))
    conditioning = flow.conditioning(len(x), labels, flow.context_of(x))
    z, _ = flow.bijection.run(executor(sums), "forward", v, conditioning)
    density = normal_log_density(z)
    if flow.class_prior is not None and labels is not None:
        density = flow.class_prior.log_prob_by_entry(z, labels)
    levels = flow.split_latents(density + flow.dequantizer.of_entry)
    # A density without layers, of another library, has a base of its own.
    if levels[0].ndim != 4 or sums.without or not sums.places:
        return {}, of_noise
    places: dict[Size, Tensor] = {}
    for part in [of_image, *sums.places.values(), *(level.sum(dim=1) for level in levels)]:
        _add(places, part.cpu().double())
    places = {size: each for size, each in places.items() if each.any()}  # a squeeze has only zeros
    return dict(sorted(places.items(), reverse=True)), of_noise


def merged(places: dict[Size, Tensor], size: Size) -> Tensor:
    """Maps `(..., h, w)` of several sizes as one of `size`: pixels have their cell's value."""
    height, width = size
    each = [
        values.repeat_interleave(height // h, -2).repeat_interleave(width // w, -1)
        for (h, w), values in places.items()
    ]
    return torch.stack(each).sum(dim=0)

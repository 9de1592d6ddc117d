"""Recursive flows on the sphere S^2: Normalizing Flows on Tori and Spheres (Rezende et al. 2020,
arXiv:2002.02428).

For points of the unit sphere in three dimensions, `(3, 1, 1)`; the density is with respect to its
area.

Deliberate differences from the paper:
- the coordinates are longitude and latitude, with the log-determinant that goes with them; the
  paper's height, the sine of the latitude, would preserve areas, but loses what is near a pole to
  float32;
- the paper transforms the height, and the longitude given the height, once. Here that is done
  several times over, and the latitude is given the longitude too: a coupling each, by turns;
- the base is the uniform density on the sphere, as in the paper, but written as two normal numbers;
- all conditioners end in zeros, so that the flow starts as the uniform density, 1 / 4 pi.

As any flow in these coordinates, its density at the two poles may depend on the longitude from
which one comes.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from flowtrain.bijections import (
    AnglesToNormal,
    Bijection,
    CircularSplineTransform,
    Coupling,
    Sequential,
    SphereToAngles,
    SplineTransform,
)
from flowtrain.bijections.spline import MAX_BINS
from flowtrain.errors import UserError
from flowtrain.nets.dense import DenseNet

Positive = Annotated[int, Field(ge=1)]


class CircularNet(nn.Module):
    """A `DenseNet` of angles `(B, C)`, which it sees by cosine and sine: whole turns make no
    difference.
    """

    def __init__(self, angles: int, out_features: int, width: int, hidden_layers: int):
        super().__init__()
        self.net = DenseNet(2 * angles, out_features, width, hidden_layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(torch.cat([x.cos(), x.sin()], dim=1), context)


def build(
    shape: tuple[int, int, int],
    *,
    layers: Positive = 4,
    width: Positive = 64,
    hidden_layers: Positive = 2,
    bins: Annotated[int, Field(ge=1, le=MAX_BINS)] = 8,
) -> Bijection:
    """Recursive flow for points of the unit sphere, `shape` (3, 1, 1).

    Args:
        layers: of two couplings each: the longitude given the latitude, the latitude given the
            longitude.
        width: units of a hidden layer of a conditioner.
        hidden_layers: of each conditioner.
        bins: of the splines of the circle and of the latitude.

    Raises:
        UserError: for another shape.
    """
    if tuple(shape) != (3, 1, 1):
        raise UserError(
            f"model.name: sphere is for points of the unit sphere, 3x1x1; got "
            f"{'x'.join(map(str, shape))}"
        )
    bijections: list[Bijection] = [SphereToAngles()]
    for _ in range(layers):
        circular = CircularSplineTransform(bins)
        interval = SplineTransform(bins, math.pi / 2, free_ends=True)
        for transform, swap in ((circular, True), (interval, False)):
            net = CircularNet(1, transform.parameters_per_entry, width, hidden_layers)
            bijections.append(Coupling(1, net, transform, swap=swap))
    return Sequential(*bijections, AnglesToNormal())

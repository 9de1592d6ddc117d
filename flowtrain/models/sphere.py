"""Recursive flows on the sphere S^2: Normalizing Flows on Tori and Spheres (Rezende et al. 2020,
arXiv:2002.02428).

The data are points of the unit sphere in three dimensions, `(3, 1, 1)`. The density is with respect
to its area.

Deliberate differences from the paper:
- The coordinates are longitude and latitude, with their log-determinant. The paper's height, the
  sine of the latitude, would preserve areas, but float32 cannot resolve heights near a pole.
- The paper transforms the height, and the longitude given the height, once. Here couplings do that
  several times by turns, and the latitude is also given the longitude.
- The base is the uniform density on the sphere, as in the paper, but written as two normal numbers.
- All conditioners end in zeros, so the flow starts as the uniform density, 1 / 4 pi.

As for any flow in these coordinates, the density at a pole may depend on the longitude along which
one approaches it.
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
    Sequential,
    SphereToAngles,
    SplineTransform,
)
from flowtrain.bijections.context import Context
from flowtrain.bijections.spline import MAX_BINS
from flowtrain.errors import UserError
from flowtrain.models.base import vector_coupling
from flowtrain.nets.dense import DenseNet
from flowtrain.types import Positive, Shape


class CircularNet(nn.Module):
    """A `DenseNet` of angles `(B, C)`. It sees cosines and sines, so whole turns do not matter."""

    def __init__(self, angles: int, out_features: int, width: int, hidden_layers: int):
        super().__init__()
        self.net = DenseNet(2 * angles, out_features, width, hidden_layers)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        parameters: Tensor = self.net(torch.cat([x.cos(), x.sin()], dim=1), context)
        return parameters


def build(
    shape: Shape,
    *,
    layers: Positive = 4,
    width: Positive = 64,
    hidden_layers: Positive = 2,
    bins: Annotated[int, Field(ge=1, le=MAX_BINS)] = 8,
) -> Bijection:
    """Recursive flow for points of the unit sphere, `shape` (3, 1, 1).

    Args:
        layers: Number of layers of two couplings: a spline on the circle of longitudes given the
            latitude, and a spline on the latitude given the longitude.
        width: Units per hidden layer.
        hidden_layers: Hidden layers per conditioner.
        bins: Bins per spline.

    Raises:
        UserError: for any other shape.
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
        for index, transform in ((1, circular), (0, interval)):
            coupling = vector_coupling(index, 2, width, hidden_layers, transform, CircularNet)
            bijections.append(coupling)
    return Sequential(*bijections, AnglesToNormal())

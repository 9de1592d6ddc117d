"""Flows on a torus: Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

The data are C angles in radians, `(C, 1, 1)`. The density is with respect to the angles, and has
their period.

Deliberate differences from the paper:
- The paper transforms one angle after the other (autoregressively). Here couplings keep the halves
  of the angles by turns.
- The base is the uniform density, as in the paper, but written as C normal numbers.
- All conditioners end in zeros, so the flow starts as the uniform density, `(2 pi)^-C`.
"""

from typing import Annotated

from pydantic import Field

from flowtrain.bijections import (
    Bijection,
    CirclesToNormal,
    CircularSplineTransform,
    FlattenAngles,
    Sequential,
)
from flowtrain.bijections.spline import MAX_BINS
from flowtrain.errors import UserError
from flowtrain.models.base import vector_coupling
from flowtrain.models.sphere import CircularNet
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    *,
    layers: Positive = 4,
    width: Positive = 64,
    hidden_layers: Positive = 2,
    bins: Annotated[int, Field(ge=1, le=MAX_BINS)] = 8,
) -> Bijection:
    """Flow for points of a torus, `shape` (C, 1, 1): two angles or more.

    Args:
        layers: Number of layers of two couplings by splines on the circle, which keep the first and
            the second half of the angles.
        width: Units per hidden layer.
        hidden_layers: Hidden layers per conditioner.
        bins: Bins per spline.

    Raises:
        UserError: for any other shape.
    """
    angles, *sides = shape
    if sides != [1, 1]:
        raise UserError(f"model.name: torus is for angles, Cx1x1; got {'x'.join(map(str, shape))}")
    couplings = (
        vector_coupling(i, angles, width, hidden_layers, CircularSplineTransform(bins), CircularNet)
        for i in range(2 * layers)
    )
    return Sequential(FlattenAngles(shape), *couplings, CirclesToNormal())

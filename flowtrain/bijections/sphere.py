"""The two ends of a flow on the sphere S^2: points to longitude and latitude, and these to normal
numbers.

In between are layers on longitude and latitude, `(B, 2)`, in radians. A longitude may have any
number of whole turns
more: layers of the circle keep them (`CircularSplineTransform`).
"""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.spline import whole_turns

# At the poles a longitude says nothing, and the area of a cell of longitude and latitude vanishes.
# A point that is nearer than this, in radians, is moved there: far enough for the density to be
# known to some percent, where float32 has a spacing of 1.2e-7, and not as far as anyone would see.
POLE = 8e-6
# Layers may bring it nearer. This, that spacing, is what keeps the cosine of a latitude above zero.
NEAREST = 2.0**-23
# How far from the sphere a point may be, as a part of the radius. Float32 rounds by about a
# thousandth of that.
TOLERANCE = 1e-4
# A share of the circle is kept this far from 0 and 1, where its normal quantile is infinite:
# float32's rounding.
EDGE = 2.0**-24


class SphereToAngles(Bijection):
    """Points of the unit sphere `(B, 3, 1, 1)` to longitude and latitude `(B, 2)`, the first step
    of a recursive flow (Rezende et al. 2020, arXiv:2002.02428), whose cylinder has the sine of the
    latitude as its height.

    The map is from a surface in 3 dimensions to 2: densities are with respect to the area on the
    sphere, of which a cell has `cos(latitude)` times its extent, and `log|det| = -log
    cos(latitude)`. (It is `-1/2 log det(J^T J)`, J the 3 by 2 Jacobian of the inverse.) Off the
    sphere there is no density: `log|det|` is minus infinity.

    The latitude is an arc length. The height would be area-preserving (Archimedes), but float32
    cannot tell heights
    near the poles apart: to points that are 3e-4 away it would be that of the pole.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second, height = x.flatten(1).unbind(1)
        latitude = _away_from_poles(torch.atan2(height, torch.hypot(first, second)), POLE)
        off = (x.flatten(1).norm(dim=1) - 1).abs() > TOLERANCE
        log_det = torch.where(off, -math.inf, -latitude.cos().log())
        return torch.stack([torch.atan2(second, first), latitude], dim=1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        longitude = z[:, 0]
        latitude = _away_from_poles(z[:, 1], NEAREST)
        radius = latitude.cos()
        x = torch.stack([radius * longitude.cos(), radius * longitude.sin(), latitude.sin()], dim=1)
        return x[:, :, None, None], radius.log()

    def latent_dims(self, dims: int) -> int:
        return 2


class AnglesToNormal(Bijection):
    """Longitude and latitude `(B, 2)` to two standard normal numbers, so that a uniform point of
    the sphere is two
    independent ones: the normal quantiles of the share of the circle that is west of it, and of the
    share of the sphere's area that is south.

    Of the share of the area `(1 + sin(latitude)) / 2` the smaller side is computed, `sin((pi/2 -
    |latitude|) / 2)^2`, which is exact to float precision at both poles. At the end of the circle
    it is the longitude that is rounded.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        longitude, latitude = x.unbind(1)
        share = 0.5 + (longitude - whole_turns(longitude)) / (2 * math.pi)
        share = share.clamp(EDGE, 1 - EDGE)
        latitude = _away_from_poles(latitude, NEAREST)
        north = latitude > 0
        # to the south pole, at the same distance from its own
        nearer = torch.where(north, -latitude, latitude)
        quantile = torch.special.ndtri((math.pi / 4 + nearer / 2).sin().square())
        z = torch.stack(
            [torch.special.ndtri(share), torch.where(north, -quantile, quantile)], dim=1
        )
        return z, latitude.cos().log() - _log_uniform_to_normal(z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        longitude = 2 * math.pi * (torch.special.ndtr(z[:, 0]) - 0.5)
        north = z[:, 1] > 0
        # ndtr has no precision far out
        log_share = torch.special.log_ndtr(torch.where(north, -z[:, 1], z[:, 1]))
        nearer = 2 * (log_share / 2).exp().asin() - math.pi / 2
        latitude = _away_from_poles(torch.where(north, -nearer, nearer), NEAREST)
        return torch.stack([longitude, latitude], dim=1), _log_uniform_to_normal(
            z
        ) - latitude.cos().log()


def _away_from_poles(latitude: Tensor, distance: float) -> Tensor:
    return latitude.clamp(distance - math.pi / 2, math.pi / 2 - distance)


def _log_uniform_to_normal(z: Tensor) -> Tensor:
    """The log-density of two standard normal numbers, `(B, 2)` to `(B,)`, relative to the uniform
    one, 1 / 4 pi.
    """
    return math.log(4 * math.pi) - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)

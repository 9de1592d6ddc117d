"""The two ends of a flow on the sphere S^2, and of one on a torus.

`SphereToAngles` maps points to longitude and latitude. `AnglesToNormal` maps these to normal
numbers. Between them are layers on longitude and latitude, `(B, 2)`, in radians. A longitude may
include any number of whole turns, which layers of the circle keep (`CircularSplineTransform`).

A torus has angles only, `(B, C)`. `FlattenAngles` takes the whole turns away on the way back to the
data, and `CirclesToNormal` maps angles to normal numbers.
"""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, sum_per_example
from flowtrain.bijections.context import Context
from flowtrain.bijections.reshape import Flatten
from flowtrain.bijections.spline import whole_turns

# At the poles the area of a cell of longitude and latitude vanishes. A data point that is nearer to
# a pole than this, in radians, is moved to this distance. Float32 has a spacing of 1.2e-7 there, so
# the density is known to some percent.
POLE = 8e-6
# Layers may bring a point nearer to a pole, but no nearer than the spacing of float32, so that the
# cosine of its latitude stays above zero.
NEAREST = 2.0**-23
TOLERANCE = 1e-4  # distance of a point from the unit sphere; float32 rounds by a thousandth of it
# Shares of the circle are kept this far from 0 and 1, where the normal quantile is infinite.
EDGE = 2.0**-24


class SphereToAngles(Bijection):
    """Points of the unit sphere `(B, 3, 1, 1)` to longitude and latitude `(B, 2)`.

    Densities are with respect to the area on the sphere, so `log|det| = -log cos(latitude)`. (This
    is `-1/2 log det(J^T J)`, with J the 3 by 2 Jacobian of the inverse.) Off the sphere there is no
    density: there `log|det|` is minus infinity.

    This is the first step of a recursive flow (Rezende et al. 2020, arXiv:2002.02428). The paper's
    coordinate is the height, the sine of the latitude. In float32, points up to about 2e-4 from a
    pole have the height of the pole, so the coordinate here is the latitude.
    """

    of_angles = True

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        first, second, height = x.flatten(1).unbind(1)
        latitude = _away_from_poles(torch.atan2(height, torch.hypot(first, second)), POLE)
        off = (x.flatten(1).norm(dim=1) - 1).abs() > TOLERANCE
        log_det = torch.where(off, -math.inf, -latitude.cos().log())
        return torch.stack([torch.atan2(second, first), latitude], dim=1), log_det

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        longitude = z[:, 0]
        latitude = _away_from_poles(z[:, 1], NEAREST)
        radius = latitude.cos()
        x = torch.stack([radius * longitude.cos(), radius * longitude.sin(), latitude.sin()], dim=1)
        return x[:, :, None, None], radius.log()

    def latent_dims(self, dims: int) -> int:
        return 2


class AnglesToNormal(Bijection):
    """Longitude and latitude `(B, 2)` to two numbers, standard normal for uniform points.

    They are the normal quantiles of two independent shares: the share of the circle that is west
    of the point, and the share of the sphere's area that is south of it, `(1 + sin(latitude)) / 2`.
    The smaller of it and its complement is computed, `sin((pi/2 - |latitude|) / 2)^2`, which is
    exact to float precision at both poles.
    """

    of_angles = True

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        longitude, latitude = x.unbind(1)
        latitude = _away_from_poles(latitude, NEAREST)
        north = latitude > 0
        southern = torch.where(north, -latitude, latitude)  # the point, or its mirror image
        quantile = torch.special.ndtri((math.pi / 4 + southern / 2).sin().square())
        z = torch.stack(
            [_circle_to_normal(longitude), torch.where(north, -quantile, quantile)], dim=1
        )
        return z, latitude.cos().log() - _log_uniform_to_normal(z)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        longitude = _normal_to_circle(z[:, 0])
        north = z[:, 1] > 0
        # In logs, because ndtr is not precise in the tails.
        log_share = torch.special.log_ndtr(torch.where(north, -z[:, 1], z[:, 1]))
        southern = 2 * (log_share / 2).exp().asin() - math.pi / 2
        latitude = _away_from_poles(torch.where(north, -southern, southern), NEAREST)
        log_det = _log_uniform_to_normal(z) - latitude.cos().log()
        return torch.stack([longitude, latitude], dim=1), log_det


class FlattenAngles(Flatten):
    """Angles `(B, C, 1, 1)` in radians to `(B, C)`. The inverse leaves no whole turns."""

    of_angles = True

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z - whole_turns(z), context)


class CirclesToNormal(Bijection):
    """Angles `(B, C)` to C numbers, standard normal for uniform angles.

    They are the normal quantiles of the shares of the circles up to each angle, from -pi.
    """

    of_angles = True

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z = _circle_to_normal(x)
        return z, -_log_normal_to_circle(z)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return _normal_to_circle(z), _log_normal_to_circle(z)


def of_angles(bijection: Bijection) -> bool:
    """Whether a layer maps angles, to which whole turns make no difference."""
    return any(isinstance(part, Bijection) and part.of_angles for part in bijection.modules())


def _circle_to_normal(angle: Tensor) -> Tensor:
    share = 0.5 + (angle - whole_turns(angle)) / (2 * math.pi)
    z: Tensor = torch.special.ndtri(share.clamp(EDGE, 1 - EDGE))
    return z


def _normal_to_circle(z: Tensor) -> Tensor:
    angle: Tensor = 2 * math.pi * (torch.special.ndtr(z) - 0.5)
    return angle


def _log_normal_to_circle(z: Tensor) -> Tensor:
    """The log-density of N(z; 0, I), `(B, C)` to `(B,)`, relative to the uniform 1 / 2 pi."""
    return 0.5 * sum_per_example(math.log(2 * math.pi) - z.square())


def _away_from_poles(latitude: Tensor, distance: float) -> Tensor:
    return latitude.clamp(distance - math.pi / 2, math.pi / 2 - distance)


def _log_uniform_to_normal(z: Tensor) -> Tensor:
    """The log-density of N(z; 0, I), `(B, 2)` to `(B,)`, relative to the uniform 1 / 4 pi."""
    return math.log(4 * math.pi) - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)

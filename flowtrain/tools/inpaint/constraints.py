"""Constraints on images, as maps from free coordinates to the images that satisfy them.

A constraint has:

- `images(s)`: dequantized images y in [0, 1), `(B, C, H, W)`, at any real coordinates s of that
  shape. All satisfy the constraint, so every proposal of a sampler does. Without a model, all
  coordinates are independent standard normal numbers. The second result `(B,)` is the log of the
  volume of images for a volume of coordinates, minus the standard normal log-density of s, up to a
  constant. So a density p of images becomes `log p(y) + this - |s|^2 / 2` in coordinates. Both are
  differentiable.
- `coordinates(y)`: the coordinates of dequantized images, or of images nearby that satisfy it
- `miss(y)`: half the squared distance `(B,)` of dequantized images from the constraint
- `moves` and `unknown`: the coordinates that affect the image, and the entries of the image that
  are not known themselves, bool `(C, H, W)`
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flowtrain.bijections.monotone import solve_monotone
from flowtrain.flow.dequantize import EDGE
from flowtrain.flow.image_context import ImageContext

FARTHEST = 12.0  # a normal quantile beyond the range of float32


class Pixels:
    """The `known` entries of `x` are known, both `(C, H, W)`.

    Each entry has a range: its cell [x / Q, (x + 1) / Q) if its level x is known, otherwise [0, 1).
    A coordinate s is the place in it, `y = low + width Phi(s)`. So the noise within the cells of
    known entries is sampled as well, and the result is exact: the probability of an image is the
    integral over its cells. Without `within`, the density is constant in cells, so known entries do
    not move.
    """

    def __init__(self, x: Tensor, known: Tensor, num_bins: int, within: bool = True):
        self.x, self.known, self.unknown = x, known, ~known
        self.moves = torch.ones_like(known) if within else self.unknown
        # As in training, the noise stays so far from the edges that rounding does not move it over.
        edge = EDGE if within else 0.5
        self.low = torch.where(known, (x + edge) / num_bins, EDGE / num_bins)
        self.width = torch.where(known, (1 - 2 * edge) / num_bins, 1 - 2 * EDGE / num_bins)

    def images(self, s: Tensor) -> tuple[Tensor, Tensor]:
        y = self.low.to(s) + self.width.to(s) * torch.special.ndtr(s)
        return y, s.new_zeros(len(s))

    def coordinates(self, y: Tensor) -> Tensor:
        place = (y - self.low.to(y)) / self.width.to(y).clamp_min(torch.finfo(y.dtype).tiny)
        elsewhere = self.known.to(y.device) & ((place <= 0) | (place >= 1))
        return _quantile(torch.where(elsewhere, 0.5, place))

    def miss(self, y: Tensor) -> Tensor:
        middle = self.low.to(y) + self.width.to(y) / 2
        return _half_square((y - middle) * self.known.to(y))


class Averages:
    """The rounded means of patches of factor x factor pixels are known: super-resolution.

    The mean of the dequantized patch is held at the middle of the cell of its rounded mean c, at
    (c + 1/2) / Q. With any noise, the sum of the integers is between `f^2 (c - 1/2)` and `f^2 (c +
    1/2)` for `f^2` pixels, and rounds to c. The mean before rounding is not sampled.

    Within a patch, `y_i = Phi(r_i + a)`, where r are the coordinates minus their mean, and the
    number a gives the mean. The volume of the images with this mean, for a volume of r, is
    `prod phi(r_i + a) / mean phi(r_i + a)`: the Jacobian of (r, a) has the product, and along a the
    mean changes by the denominator.

    `small` are the rounded means, integers `(C, H', W')`, and `context` maps an image to them.
    """

    def __init__(self, small: Tensor, context: ImageContext):
        self.context = context
        self.mean = (small.float() + 0.5) / context.num_bins
        self.moves = self.unknown = torch.ones(context.image, dtype=torch.bool)

    def images(self, s: Tensor) -> tuple[Tensor, Tensor]:
        f = self.context.factor
        patches = s.unflatten(3, (-1, f)).unflatten(2, (-1, f)).transpose(3, 4).flatten(4)
        r = patches - patches.mean(dim=4, keepdim=True)  # (B, C, H', W', f^2)
        mean = self.mean.to(s)[..., None].expand(*r.shape[:4], 1)

        def mean_at(a: Tensor) -> tuple[Tensor, Tensor]:
            q = r + a
            density = (-0.5 * q.square()).exp() / math.sqrt(2 * math.pi)
            return torch.special.ndtr(q).mean(4, keepdim=True), density.mean(4, keepdim=True)

        # The mean lies between the values for the smallest and the largest r alone.
        middle = torch.special.ndtri(mean)
        a = solve_monotone(
            mean_at, mean, middle - r.amax(4, keepdim=True), middle - r.amin(4, keepdim=True)
        )
        value, derivative = mean_at(a)
        # One more step of Newton's method has the derivatives of the solution.
        a = a - (value - mean) / derivative.detach().clamp_min(torch.finfo(s.dtype).tiny)
        q = (r + a).clamp(-FARTHEST, FARTHEST)
        volume = -0.5 * q.square().sum(4) - (-0.5 * q.square()).logsumexp(dim=4)
        extra = (volume + 0.5 * r.square().sum(4)).flatten(1).sum(dim=1)
        y = torch.special.ndtr(q).unflatten(4, (f, f)).transpose(3, 4).flatten(4).flatten(2, 3)
        return y, extra

    def coordinates(self, y: Tensor) -> Tensor:
        return _quantile(y)

    def miss(self, y: Tensor) -> Tensor:
        return _half_square(avg_pool2d(y, self.context.factor) - self.mean.to(y))


Constraint = Pixels | Averages


def _quantile(place: Tensor) -> Tensor:
    tiny = torch.finfo(place.dtype).eps
    quantile: Tensor = torch.special.ndtri(place.clamp(tiny, 1 - tiny))
    return quantile


def _half_square(distances: Tensor) -> Tensor:
    return 0.5 * distances.square().flatten(1).sum(dim=1)

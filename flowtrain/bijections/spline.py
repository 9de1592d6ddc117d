"""Monotone rational-quadratic splines of the line and of the circle.

Durkan et al. 2019, "Neural Spline Flows".
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.affine import gated_log_scale, log_scale_gate
from flowtrain.bijections.base import Transform, bounded

MIN_SIZE = 1e-3  # of a bin's width and height, as a share of the interval
MAX_BINS = 256  # these leave three quarters of the interval for the parameters to divide
MIN_DERIVATIVE = 1e-3  # at a knot; the largest is 1 / MIN_DERIVATIVE
DERIVATIVE_LIMIT = -math.log(MIN_DERIVATIVE)


class SplineTransform(Transform):
    """A monotone rational-quadratic spline on `[-tail_bound, tail_bound]` (eq. 4-8).

    The transform takes `(3 bins - 1) C` parameters for C entries: `bins` widths and `bins` heights
    before their softmax, and an `h` for the derivative at each inner knot. The log-derivative there
    is `limit * tanh(h / limit)` with `limit = log 1000`, where the paper has a softplus. So
    parameters of zero are the identity. No log-derivative is outside [-23, 8.3]. Raises
    `ValueError` unless `1 <= bins <= MAX_BINS`.

    Outside the interval it is the identity. A share of 6e-5 of a normal distribution is outside of
    the default one. `free_ends`, for entries that never leave the interval, makes the derivatives
    at the two ends parameters too, `3 bins + 1` in all. Otherwise they are 1.
    """

    def __init__(self, bins: int = 8, tail_bound: float = 4.0, free_ends: bool = False):
        super().__init__()
        if not 1 <= bins <= MAX_BINS:
            raise ValueError(f"{bins} bins: expected 1 to {MAX_BINS}")
        self.bins = bins
        self.tail_bound = tail_bound
        self.parameters_per_entry = 3 * bins + (1 if free_ends else -1)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        left, width, bottom, height, start, end = self._bin(x, parameters, 0)
        xi = (x.clamp(-self.tail_bound, self.tail_bound) - left) / width
        z = bottom + height * (xi * (xi + start * (1 - xi))) / _denominator(xi, start, end)
        return self._inside(x, z, _log_derivative(xi, height / width, start, end))

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        left, width, bottom, height, start, end = self._bin(z, parameters, 1)
        eta = (z.clamp(-self.tail_bound, self.tail_bound) - bottom) / height
        # Eq. 29 is xi = 2 c / (-b - sqrt(b^2 - 4 a c)). Divided by slope * height, b is
        # difference + 2 eta, c is -eta, and b^2 - 4 a c is a sum of two positive terms.
        difference = start * (1 - eta) - end * eta
        product = 4 * eta * (1 - eta)
        # difference + sqrt(...), in the form in which nothing cancels
        large = difference.abs() + (difference.square() + product).sqrt()
        total = torch.where(difference > 0, large, product / large)
        xi = 2 * eta / (2 * eta + total)
        x = left + width * xi
        return self._inside(z, x, -_log_derivative(xi, height / width, start, end))

    def _bin(self, values: Tensor, parameters: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin of each value, an x (axis 0) or a z (axis 1): its left, width, bottom and height,
        and the derivatives at its two ends as multiples of the slope `height / width`.
        """
        raw = self.parameters_by_entry(parameters)
        knots, derivatives = _Lookup.apply(values, raw, self.bins, self.tail_bound, axis)
        left, right, bottom, top = knots.flatten(1, 2).unbind(1)
        width, height = right - left, top - bottom
        derivatives = gated_log_scale(
            log_scale_gate(derivatives, DERIVATIVE_LIMIT), DERIVATIVE_LIMIT
        ).exp()
        start, end = (derivatives * (width / height)[:, None]).unbind(1)
        return left, width, bottom, height, start, end

    def _inside(
        self, given: Tensor, result: Tensor, log_derivative: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The result inside of `[-tail_bound, tail_bound]`, and the identity outside."""
        outside = given.abs() >= self.tail_bound  # False for NaN
        return torch.where(outside, given, result), log_derivative.masked_fill(outside, 0)


class CircularSplineTransform(SplineTransform):
    """A turn, then a spline of the circle: `z = S(x + turn)`.

    See the "circular splines" of Rezende et al. 2020, arXiv:2002.02428. Entries are angles in
    radians, and keep any number of whole turns: `z(x + 2 pi) = z(x) + 2 pi`. S is a
    rational-quadratic spline of `[-pi, pi]` onto itself, with one derivative for both ends. By its
    turn, each layer has its ends at another angle.

    The transform takes `(3 bins + 1) C` parameters for C entries: the turn `pi * tanh(h / pi)`, at
    most half a turn either way, then `bins` widths, heights and derivatives. Parameters of zero
    are the identity.
    """

    def __init__(self, bins: int = 8):
        super().__init__(bins, math.pi, free_ends=True)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        turned = x + self._turn(x, parameters)
        whole = whole_turns(turned)
        z, log_derivative = super().forward(turned - whole, parameters)
        return z + whole, log_derivative

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        whole = whole_turns(z)
        turned, log_derivative = super().inverse(z - whole, parameters)
        return turned + whole - self._turn(z, parameters), log_derivative

    def _turn(self, x: Tensor, parameters: Tensor) -> Tensor:
        return bounded(parameters[:, : x.shape[1]], math.pi)

    def parameters_by_entry(self, parameters: Tensor) -> Tensor:
        sizes = [1, 2 * self.bins, self.bins]
        _, *raw = super().parameters_by_entry(parameters).split(sizes, dim=1)
        return torch.cat([*raw, raw[-1][:, :1]], dim=1)

    def _inside(
        self, given: Tensor, result: Tensor, log_derivative: Tensor
    ) -> tuple[Tensor, Tensor]:
        return result, log_derivative  # every angle is inside


def whole_turns(angle: Tensor) -> Tensor:
    """The whole turns of an angle, in radians: without them it is in `[-pi, pi]`."""
    return 2 * math.pi * torch.floor((angle + math.pi) / (2 * math.pi))


# Eq. 4 and 5, with everything divided by the slope.


def _denominator(xi: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return 1 + (start + end - 2) * (xi * (1 - xi))


def _log_derivative(xi: Tensor, slope: Tensor, start: Tensor, end: Tensor) -> Tensor:
    rest = 1 - xi
    numerator = end * xi.square() + 2 * xi * rest + start * rest.square()
    return (slope * numerator / _denominator(xi, start, end).square()).log()


class _Lookup(torch.autograd.Function):
    """The two knots on either side of each value, and the parameters of the derivatives there.

    The values have shape `(B, C, ...)`, and the raw parameters `(B, P, C, ...)`. The knots have
    shape `(B, 2, 2, C, ...)`: x and z, each of the lower and the upper knot. The parameters of the
    derivatives have shape `(B, 2, C, ...)`. P is `3 K + 1` or `3 K - 1` for K bins. With the latter
    the parameters at the ends of the spline are zero. Autograd takes about twice as long for the
    cumulative sums.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, raw: Tensor, bins: int, tail_bound: float, axis: int
    ) -> tuple[Tensor, Tensor]:
        shares = raw[:, : 2 * bins].unflatten(1, (2, bins)).softmax(dim=2)
        number = torch.arange(1, bins, dtype=raw.dtype, device=raw.device).view(
            -1, *[1] * (raw.ndim - 2)
        )
        ctx.factor = 2 * tail_bound * (1 - bins * MIN_SIZE)
        knots = shares[:, :, :-1].cumsum(dim=2).mul_(ctx.factor)
        knots.add_(number * (2 * tail_bound * MIN_SIZE) - tail_bound)
        index = (values[:, None] >= knots[:, axis]).sum(dim=1, keepdim=True)  # (B, 1, C, ...)
        both = torch.cat([index, index + 1], dim=1)
        edge = torch.full_like(shares[:, :, :1], tail_bound)
        knots = torch.cat([-edge, knots, edge], dim=2).gather(2, torch.stack([both, both], dim=1))
        derivatives = raw[:, 2 * bins :]
        ctx.free_ends = derivatives.shape[1] > bins
        if not ctx.free_ends:
            zero = torch.zeros_like(raw[:, :1])
            derivatives = torch.cat([zero, derivatives, zero], dim=1)
        ctx.save_for_backward(shares, index)
        return knots, derivatives.gather(1, both)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_knots: Tensor, grad_derivatives: Tensor
    ) -> tuple[None, Tensor, None, None, None]:
        shares, index = ctx.saved_tensors
        bins = shares.shape[2]
        # A knot is the sum of the sizes of the bins before it: 1 for these, 0 for the others. The
        # last knot is the sum of all sizes, which the softmax keeps constant.
        number = torch.arange(bins, dtype=shares.dtype, device=shares.device).view(
            -1, *[1] * (index.ndim - 2)
        )
        before_lower = (index.to(shares.dtype) - number).clamp_(0, 1)
        before_upper = (index.to(shares.dtype) - (number - 1)).clamp_(0, 1)
        # Both (B, 2, 1, C, ...).
        grad_lower, grad_upper = grad_knots.mul(ctx.factor).unsqueeze(3).unbind(2)
        grad_shares = torch.addcmul(
            grad_lower * before_lower[:, None], grad_upper, before_upper[:, None]
        )
        grad_sizes = torch.ops.aten._softmax_backward_data(grad_shares, shares, 2, shares.dtype)
        here = before_upper - before_lower  # 1 for the value's bin, 0 for the others
        grad_start, grad_end = grad_derivatives.unsqueeze(2).unbind(1)
        grads = [
            *grad_sizes.unbind(1),
            torch.addcmul(grad_start * here[:, 1:], grad_end, here[:, :-1]),
        ]
        if ctx.free_ends:
            grads[2:] = [grad_start * here[:, :1], grads[2], grad_end * here[:, -1:]]
        return None, torch.cat(grads, dim=1), None, None, None

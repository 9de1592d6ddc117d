"""Increasing maps of single entries in whole numbers, and which of them each transform is.

All values are int64, in units of `2**-bits`.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from flowtrain.bijections import AdditiveTransform, AffineTransform, Transform
from flowtrain.bijections.affine import UnboundedAffine
from flowtrain.bijections.coupling import gated_log_scale, log_scale_gate
from flowtrain.errors import UserError
from flowtrain.tools.archive.stack import LARGEST_SIZE, Stack, scale, unscale, whole

# Precision of a slope. The coder's own precision is 24 bits; a size of n loses n / 2**24 of it.
SLOPE_BITS = 9
CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units


class Rule(Protocol):
    """A layer in whole numbers. `forward` is data to latent."""

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...


def finite(x: Tensor) -> Tensor:
    """x, or `FloatingPointError`: no whole number stands for a value that is not finite."""
    if not torch.isfinite(x).all():
        raise FloatingPointError("a weight, or what a network computes, is not finite")
    return x


class Monotone:
    """An increasing map of one entry, made linear within cells of `2**CELL_BITS` units.

    The lower edge of cell number b is mapped to `function(edge)`, rounded, plus b units. So no cell
    becomes empty, however flat the function is, and the slope is larger by `2**-CELL_BITS`.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], bits: int
    ):
        self.function = function
        self.approximate_inverse = inverse
        self.bits = bits

    def _edge(self, cell: Tensor) -> Tensor:
        edge = cell.double() * 2.0 ** (CELL_BITS - self.bits)
        return whole(self.function(edge), self.bits) + cell

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        cell = x >> CELL_BITS
        lower, upper = self._edge(cell), self._edge(cell + 1)
        width = torch.full_like(x, 2**CELL_BITS)
        return lower + scale(x - (cell << CELL_BITS), upper - lower, width, stack)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        # Without the slope that was added, x would be `end`; with it, x is between there and zero.
        end = self.approximate_inverse(z.double() * 2.0**-self.bits)
        end = end * 2.0 ** (self.bits - CELL_BITS)
        low, high = end.clamp(max=0).floor().long() - 2, end.clamp(min=0).ceil().long() + 2
        while (high - low > 1).any():
            middle = (low + high) >> 1
            below = self._edge(middle) <= z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        lower, upper = self._edge(low), self._edge(low + 1)
        width = torch.full_like(z, 2**CELL_BITS)
        return (low << CELL_BITS) + unscale(z - lower, upper - lower, width, stack)


class Diagonal:
    """`x * slope + shift` with one slope and one shift per entry, broadcast."""

    def __init__(self, slope: Tensor, shift: Tensor, bits: int):
        self.numerator, self.denominator = _closest_fractions(finite(slope))
        self.shift = whole(finite(shift), bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        slope = self.numerator.expand_as(x), self.denominator.expand_as(x)
        return scale(x, *slope, stack) + self.shift

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        slope = self.numerator.expand_as(z), self.denominator.expand_as(z)
        return unscale(z - self.shift, *slope, stack)


def _closest_fractions(slope: Tensor) -> tuple[Tensor, Tensor]:
    """The closest fractions of small numbers: numerators and denominators, of the slope's shape.

    Raises `UserError` for slopes that the stack of bits cannot scale by.
    """
    if not ((slope <= LARGEST_SIZE) & (slope >= 1 / LARGEST_SIZE)).all():
        raise UserError(
            f"compress: the model scales a value by {slope.min():.3g} or {slope.max():.3g}, and "
            f"whole numbers only by 1/{LARGEST_SIZE} to {LARGEST_SIZE}"
        )
    fractions = []
    for value in slope.flatten().tolist():
        larger, smaller = max(value, 1 / value), min(value, 1 / value)
        large = Fraction(larger).limit_denominator(max(1, int(2**SLOPE_BITS * smaller)))
        fractions.append(large if value >= 1 else 1 / large)
    pairs = torch.tensor([(f.numerator, f.denominator) for f in fractions])
    return pairs[:, 0].view_as(slope), pairs[:, 1].view_as(slope)


@singledispatch
def transform_rule(transform: Transform, bits: int) -> Callable[[Tensor], Rule]:
    """A function from the transform's parameters to what it does with the entries.

    Every transform has a rule, because it is increasing. The affine ones have an exact rule.
    """
    return lambda parameters: Monotone(
        lambda x: transform.forward(x, parameters)[0],
        lambda z: transform.inverse(z, parameters)[0],
        bits,
    )


class AffineRule:
    """An affine transform: a shift and a `scale`, since the slopes are fractions."""

    def __init__(self, parameters: Tensor, log_scale: Callable[[Tensor], Tensor], bits: int):
        shift, raw = parameters.chunk(2, dim=1)
        self.shift = whole(shift, bits)
        self.slope = _fractions(log_scale(raw))

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return scale(x + self.shift, *self.slope, stack)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return unscale(z, *self.slope, stack) - self.shift


def _fractions(log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`exp(log_scale)` as numerators and denominators, which are powers of 2."""
    exponent = (log_scale / math.log(2)).ceil().long()
    shift = (SLOPE_BITS - exponent).clamp(0, 22)
    denominator = torch.ones_like(shift) << shift
    return (log_scale.exp() * denominator).round().long().clamp(min=1), denominator


@transform_rule.register
def _(transform: AffineTransform, bits: int) -> Callable[[Tensor], Rule]:
    def log_scale(raw: Tensor) -> Tensor:
        return gated_log_scale(log_scale_gate(raw, transform.limit), transform.limit)

    return lambda parameters: AffineRule(parameters, log_scale, bits)


@transform_rule.register
def _(transform: UnboundedAffine, bits: int) -> Callable[[Tensor], Rule]:
    return lambda parameters: AffineRule(parameters, transform.log_scale, bits)


class AdditiveRule:
    """`AdditiveTransform`."""

    def __init__(self, shift: Tensor, bits: int):
        self.shift = whole(shift, bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return x + self.shift

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return z - self.shift


@transform_rule.register
def _(transform: AdditiveTransform, bits: int) -> Callable[[Tensor], Rule]:
    return lambda parameters: AdditiveRule(parameters, bits)

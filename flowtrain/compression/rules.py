"""A rule for each kind of layer: what it does with whole numbers and a stack of bits."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    AffineTransform,
    Bijection,
    CheckerboardCoupling,
    Coupling,
    DiagonalAffine,
    Flatten,
    LogisticToNormal,
    Multiscale,
    Permute,
    Sequential,
    Squeeze,
    Transform,
)
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.coupling import gated_log_scale, log_scale_gate
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.compression.stack import Monotone, Stack, scale, unscale, whole
from flowtrain.errors import UserError

PREDICTED_BITS = 12  # of what networks predict
# of a slope; the coder's own precision is 24 bits, of which a size of n loses n / 2**24
SLOPE_BITS = 9
MATRIX_BITS = 14  # of the triangular factors of a 1x1 convolution


def _slope(log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`exp(log_scale)` as a fraction, the denominator a power of 2."""
    exponent = (log_scale / math.log(2)).ceil().long()
    shift = (SLOPE_BITS - exponent).clamp(0, 22)
    denominator = torch.ones_like(shift) << shift
    return (log_scale.exp() * denominator).round().long().clamp(min=1), denominator


def _finite(x: Tensor) -> Tensor:
    """x, or `FloatingPointError`: there is no whole number for what is not finite."""
    if not torch.isfinite(x).all():
        raise FloatingPointError("a weight, or what a network computes, is not finite")
    return x


def _best_slope(slope: Tensor) -> tuple[Tensor, Tensor]:
    """`slope` as fractions of small numbers, the closest ones."""
    _finite(slope)
    limit = 2**SLOPE_BITS
    fractions = []
    for value in slope.flatten().tolist():
        large = Fraction(max(value, 1 / value)).limit_denominator(
            max(1, int(limit * min(value, 1 / value)))
        )
        fractions.append(large if value >= 1 else 1 / large)
    numerator, denominator = torch.tensor([(f.numerator, f.denominator) for f in fractions]).unbind(
        1
    )
    return numerator.view_as(slope), denominator.view_as(slope)


# --- layers ---------------------------------------------------------------------------------------


class Rule(Protocol):
    """A layer in whole numbers. `forward` is data to latent; `context` is that of the layer,
    float64.
    """

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...


@singledispatch
def rule(layer: Bijection, bits: int) -> Rule:
    """The rule of a layer, in units of `2**-bits`. Raises `UserError` for a kind of layer that has
    none.
    """
    raise UserError(
        f"compress: a layer of the model is of a kind that has no coding rule: "
        f"{type(layer).__name__}"
    )


class Chain:
    """Rules one after the other."""

    def __init__(self, rules: list[Rule]):
        self.rules = rules

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        for each in self.rules:
            x = each.forward(x, context, stack)
        return x

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        for each in reversed(self.rules):
            z = each.inverse(z, context, stack)
        return z


@rule.register
def _(layer: Sequential, bits: int) -> Rule:
    return Chain([rule(each, bits) for each in fuse(list(layer.layers))])  # type: ignore[arg-type]


class Moves:
    """A layer that only moves entries does the same with whole numbers."""

    def __init__(self, layer: Bijection):
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.layer.forward(x)[0]

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.layer.inverse(z)[0]


@rule.register
def _(layer: Squeeze | Flatten | Permute, bits: int) -> Rule:
    return Moves(layer)


class Diagonal:
    """`x * slope + shift` with one slope and one shift for each entry, broadcast."""

    def __init__(self, slope: Tensor, shift: Tensor, bits: int):
        self.numerator, self.denominator = _best_slope(slope)
        self.shift = whole(_finite(shift), bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return (
            scale(x, self.numerator.expand_as(x), self.denominator.expand_as(x), stack) + self.shift
        )

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return unscale(
            z - self.shift, self.numerator.expand_as(z), self.denominator.expand_as(z), stack
        )


@rule.register
def _(layer: DiagonalAffine | ActNorm, bits: int) -> Rule:
    slope = layer.log_scales().exp()
    return Diagonal(slope, layer.shift, bits)


class Linear:
    """`W x + b` at every pixel, `W = P L D U` with unit triangular L and U: they are shifts, and
    take no bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, bits: int):
        permutation, lower, upper = torch.linalg.lu(_finite(weight))
        diagonal = upper.diagonal()
        if not (diagonal != 0).all():
            raise FloatingPointError("a 1x1 convolution is singular")
        self.order = permutation.argmax(dim=1)  # row i of P L takes row order[i] of L
        self.lower = whole(lower.tril(-1), MATRIX_BITS)
        self.upper = whole((upper / diagonal[:, None]).triu(1), MATRIX_BITS)
        self.sign = diagonal.sign().long()[:, None]
        self.diagonal = Diagonal(diagonal.abs()[:, None], torch.zeros(len(diagonal), 1), bits)
        self.bias = whole(_finite(bias), bits)[:, None]

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        y = x.flatten(2)
        y = self.sign * (y + _product(self.upper, y))
        y = self.diagonal.forward(y, context, stack)
        y = y + _product(self.lower, y)
        return (y[:, self.order] + self.bias).view_as(x)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        y = torch.empty_like(z.flatten(2))
        y[:, self.order] = z.flatten(2) - self.bias
        channels = range(y.shape[1])
        for i in channels:  # y[:, :i] is right already
            y[:, i] -= _product(self.lower[i : i + 1, :i], y[:, :i])[:, 0]
        y = self.sign * self.diagonal.inverse(y, context, stack)
        for i in reversed(channels):
            y[:, i] -= _product(self.upper[i : i + 1, i + 1 :], y[:, i + 1 :])[:, 0]
        return y.view_as(z)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """In whole numbers, where the order of a sum does not matter, rounded to units of `x`."""
    return (matrix @ x + 2 ** (MATRIX_BITS - 1)) >> MATRIX_BITS


@rule.register
def _(layer: FusedLinear, bits: int) -> Rule:
    weight, bias, _ = layer.tensors()
    return Linear(weight, bias, bits)


@rule.register
def _(layer: LinearChannels, bits: int) -> Rule:
    weight = layer.mixing_matrix()
    return Linear(weight, torch.zeros_like(weight[0]), bits)


class Conditioned:
    """A coupling: `changed` selects the entries that are transformed, `of_pixels` theirs of the
    predicted.
    """

    def __init__(
        self, layer: Coupling | CheckerboardCoupling, changed: tuple, of_pixels: tuple, bits: int
    ):
        self.layer = layer
        self.changed = changed
        self.of_pixels = of_pixels
        self.entries = entries(layer.transform, bits)
        self.bits = bits

    def _predicted(self, x: Tensor, context: Tensor | None) -> Tensor:
        real = x.double() * 2.0**-self.bits
        each = [
            self.layer.predict(real[i : i + 1], None if context is None else context[i : i + 1])
            for i in range(len(x))
        ]
        unit = 2.0**PREDICTED_BITS
        return (_finite(torch.cat(each)[self.of_pixels]) * unit).round() / unit

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        z = x.clone()
        z[self.changed] = self.entries(self._predicted(x, context)).forward(x[self.changed], stack)
        return z

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        x = z.clone()
        x[self.changed] = self.entries(self._predicted(z, context)).inverse(z[self.changed], stack)
        return x


@rule.register
def _(layer: Coupling, bits: int) -> Rule:
    changed = slice(None, -layer.kept) if layer.swap else slice(layer.kept, None)
    return Conditioned(layer, (slice(None), changed), (), bits)


@rule.register
def _(layer: CheckerboardCoupling, bits: int) -> Rule:
    return Conditioned(layer, (..., ~layer.keep), (..., ~layer.keep), bits)


class LogisticRule:
    """`LogisticToNormal`."""

    def __init__(self, layer: LogisticToNormal, bits: int):
        self.map = Monotone(lambda x: layer.forward(x)[0], lambda z: layer.inverse(z)[0], bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.map.forward(x, stack)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.map.inverse(z, stack)


rule.register(LogisticToNormal, LogisticRule)


class MultiscaleRule:
    """`Multiscale`: its levels, its priors, and the latents that leave."""

    def __init__(self, layer: Multiscale, bits: int):
        self.layer = layer
        self.levels = [
            Chain([rule(level, bits), rule(prior, bits)])  # type: ignore[arg-type]
            for level, prior in zip(layer.levels, layer.priors, strict=True)
        ]

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        latents = []
        for level, (channels, _, _) in zip(self.levels, self.layer.latent_shapes, strict=True):
            x = level.forward(x, context, stack)
            x, latent = x.split([x.shape[1] - channels, channels], dim=1)
            latents.append(latent.flatten(1))
        return torch.cat(latents, dim=1)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        latents = self.layer.split_latents(z)
        x = latents[-1][:, :0]
        for level, latent in zip(reversed(self.levels), reversed(latents), strict=True):
            x = level.inverse(torch.cat([x, latent], dim=1), context, stack)
        return x


rule.register(Multiscale, MultiscaleRule)


# --- transforms of couplings ----------------------------------------------------------------------


@singledispatch
def entries(transform: Transform, bits: int) -> Callable[[Tensor], Any]:
    """What a coupling does with its entries, given the parameters: an object with `forward` and
    `inverse`.

    Any transform has a rule, for it is increasing; those that are affine have one that is exact.
    """
    return lambda parameters: Monotone(
        lambda x: transform.forward(x, parameters)[0],
        lambda z: transform.inverse(z, parameters)[0],
        bits,
    )


class Affine:
    """`AffineTransform`: the slopes are fractions, so that it is a shift and a `scale`."""

    def __init__(self, parameters: Tensor, limit: float, bits: int):
        shift, raw = parameters.chunk(2, dim=1)
        self.shift = whole(shift, bits)
        self.slope = _slope(gated_log_scale(log_scale_gate(raw, limit), limit))

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        return scale(x + self.shift, *self.slope, stack)

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        return unscale(z, *self.slope, stack) - self.shift


@entries.register
def _(transform: AffineTransform, bits: int) -> Callable[[Tensor], Any]:
    return lambda parameters: Affine(parameters, transform.limit, bits)


class Additive:
    """`AdditiveTransform`."""

    def __init__(self, shift: Tensor, bits: int):
        self.shift = whole(shift, bits)

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        return x + self.shift

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        return z - self.shift


@entries.register
def _(transform: AdditiveTransform, bits: int) -> Callable[[Tensor], Any]:
    return lambda parameters: Additive(parameters, bits)

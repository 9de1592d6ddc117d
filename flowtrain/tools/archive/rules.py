"""One rule per kind of layer: what it does with whole numbers and a stack of bits.

All values are int64, in units of `2**-bits`; `context` is the layer's own, float64.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import singledispatch
from types import EllipsisType
from typing import Protocol

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
    HalvePixels,
    Inverse,
    LogisticToNormal,
    Multiscale,
    Permute,
    Reverse,
    Sequential,
    Squeeze,
    TokenAutoregressive,
    Transform,
)
from flowtrain.bijections.affine import UnboundedAffine
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.coupling import gated_log_scale, log_scale_gate
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.errors import UserError
from flowtrain.tools.archive.stack import LARGEST_SIZE, Stack, scale, unscale, whole

# Precision of a slope. The coder's own precision is 24 bits; a size of n loses n / 2**24 of it.
SLOPE_BITS = 9
MATRIX_BITS = 14  # precision of the triangular factors of a 1x1 convolution
PREDICTED_BITS = 12  # precision of what networks predict
CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units

Index = tuple[slice | Tensor | EllipsisType, ...]


class Rule(Protocol):
    """A layer in whole numbers. `forward` is data to latent."""

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...


@singledispatch
def rule(layer: Bijection, bits: int) -> Rule:
    """The rule of a layer, in units of `2**-bits`. Raises `UserError` for a kind that has none."""
    raise UserError(
        f"compress: a layer of the model is of a kind that has no coding rule: "
        f"{type(layer).__name__}"
    )


def _finite(x: Tensor) -> Tensor:
    """x, or `FloatingPointError`: no whole number stands for a value that is not finite."""
    if not torch.isfinite(x).all():
        raise FloatingPointError("a weight, or what a network computes, is not finite")
    return x


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
    layers: list[Bijection] = list(layer.layers)  # type: ignore[arg-type]
    return Chain([rule(each, bits) for each in fuse(layers, "forward")])


class MultiscaleRule:
    """`Multiscale`: its levels, its priors, and the latents that leave after each level."""

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
            x, latent = torch.split(x, [x.shape[1] - channels, channels], dim=1)
            latents.append(latent.flatten(1))
        return torch.cat(latents, dim=1)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        latents = self.layer.split_latents(z)
        x = latents[-1][:, :0]
        for level, latent in zip(reversed(self.levels), reversed(latents), strict=True):
            x = level.inverse(torch.cat([x, latent], dim=1), context, stack)
        return x


rule.register(Multiscale, MultiscaleRule)


class Moves:
    """A layer that only moves entries does the same with whole numbers."""

    def __init__(self, layer: Bijection):
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        z: Tensor = self.layer.forward(x)[0]
        return z

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.layer.inverse(z)[0]


@rule.register
def _(layer: Squeeze | Flatten | Permute | Reverse | HalvePixels, bits: int) -> Rule:
    return Moves(layer)


class Backwards:
    """`Inverse`: a rule with its two directions exchanged."""

    def __init__(self, layer: Inverse, bits: int):
        self.rule = rule(layer.bijection, bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.rule.inverse(x, context, stack)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return self.rule.forward(z, context, stack)


rule.register(Inverse, Backwards)


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


@rule.register
def _(layer: LogisticToNormal, bits: int) -> Rule:
    return Monotone(lambda x: layer.forward(x)[0], lambda z: layer.inverse(z)[0], bits)


class Diagonal:
    """`x * slope + shift` with one slope and one shift per entry, broadcast."""

    def __init__(self, slope: Tensor, shift: Tensor, bits: int):
        self.numerator, self.denominator = _closest_fractions(_finite(slope))
        self.shift = whole(_finite(shift), bits)

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


@rule.register
def _(layer: DiagonalAffine | ActNorm, bits: int) -> Rule:
    return Diagonal(layer.bounded_log_scale().exp(), layer.shift, bits)


class Linear:
    """`W x + b` at every pixel, where `W = P L D U` with unit triangular L and U.

    L and U are chains of shifts, which take no bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, bits: int):
        permutation, lower, upper = torch.linalg.lu(_finite(weight))
        diagonal = upper.diagonal()
        if not (diagonal != 0).all():
            raise FloatingPointError("a 1x1 convolution is singular")
        self.order = permutation.argmax(dim=1)  # row i of P L takes row order[i] of L
        self.lower = whole(lower.tril(-1), MATRIX_BITS)
        self.upper = whole((upper / diagonal[:, None]).triu(1), MATRIX_BITS)
        self.sign: Tensor = diagonal.sign().long()[:, None]
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
    """A product in whole numbers, where the order of a sum is irrelevant, in units of `x`."""
    product: Tensor = matrix @ x
    return torch.bitwise_right_shift(product + 2 ** (MATRIX_BITS - 1), MATRIX_BITS)


@rule.register
def _(layer: FusedLinear, bits: int) -> Rule:
    weight, bias, _ = layer.tensors()
    return Linear(weight, bias, bits)


@rule.register
def _(layer: LinearChannels, bits: int) -> Rule:
    weight = layer.mixing_matrix()
    return Linear(weight, torch.zeros_like(weight[0]), bits)


def _rounded(predicted: Tensor) -> Tensor:
    """What a network predicts, as multiples of `2**-PREDICTED_BITS`."""
    unit = 2.0**PREDICTED_BITS
    return (_finite(predicted) * unit).round() / unit


class CouplingRule:
    """A coupling. `changed` selects the entries that it transforms, and `of_pixels` the predictions
    for them.
    """

    def __init__(
        self, layer: Coupling | CheckerboardCoupling, changed: Index, of_pixels: Index, bits: int
    ):
        self.layer = layer
        self.changed = changed
        self.of_pixels = of_pixels
        self.rule_with = transform_rule(layer.transform, bits)
        self.bits = bits

    def _parameters(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The transform's parameters, computed for each image by itself and rounded."""
        real = x.double() * 2.0**-self.bits
        each = [
            self.layer.predict(real[i : i + 1], None if context is None else context[i : i + 1])
            for i in range(len(x))
        ]
        return _rounded(torch.cat(each)[self.of_pixels])

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        z = x.clone()
        entries = self.rule_with(self._parameters(x, context))
        z[self.changed] = entries.forward(x[self.changed], None, stack)
        return z

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        x = z.clone()
        entries = self.rule_with(self._parameters(z, context))
        x[self.changed] = entries.inverse(z[self.changed], None, stack)
        return x


@rule.register
def _(layer: Coupling, bits: int) -> Rule:
    changed = slice(None, -layer.kept) if layer.swap else slice(layer.kept, None)
    return CouplingRule(layer, (slice(None), changed), (), bits)


@rule.register
def _(layer: CheckerboardCoupling, bits: int) -> Rule:
    return CouplingRule(layer, (..., ~layer.keep), (..., ~layer.keep), bits)


class TokensRule:
    """`TokenAutoregressive`. Both directions predict one token after the other, by the same
    arithmetic. The stack gives back last what it took first, so `forward` changes the last token
    first.
    """

    def __init__(self, layer: TokenAutoregressive, bits: int):
        self.layer = layer
        self.rule_with = transform_rule(layer.transform, bits)
        self.bits = bits

    def _predictions(self, batch: int, context: Tensor | None) -> Callable[[Tensor | None], Rule]:
        """From the token before, `(B, E)`, what to do with the next one. Each image is computed by
        itself.
        """
        by_image = [
            self.layer.conditioner.by_token(1, None if context is None else context[i : i + 1])
            for i in range(batch)
        ]

        def following(before: Tensor | None) -> Rule:
            real = [None] * batch if before is None else before.double().mul(2.0**-self.bits)
            each = [
                predict(None if token is None else token[None])
                for predict, token in zip(by_image, real, strict=True)
            ]
            return self.rule_with(_rounded(torch.cat(each)))

        return following

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        following = self._predictions(len(x), context)
        tokens = x.flatten(2).unbind(dim=2)
        rules = [following(before) for before in (None, *tokens[:-1])]
        pairs = reversed(list(zip(rules, tokens, strict=True)))
        changed = [entries.forward(token, None, stack) for entries, token in pairs]
        return torch.stack(changed[::-1], dim=2).view_as(x)

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        following = self._predictions(len(z), context)
        tokens: list[Tensor] = []
        for target in z.flatten(2).unbind(dim=2):
            entries = following(tokens[-1] if tokens else None)
            tokens.append(entries.inverse(target, None, stack))
        return torch.stack(tokens, dim=2).view_as(z)


rule.register(TokenAutoregressive, TokensRule)


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

"""Coding rules: each layer and each transform as a map of whole numbers, with a stack of bits.

All values are int64, in units of `2**-bits`.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import singledispatch
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections import (
    AdditiveTransform,
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
from flowtrain.bijections.affine import Affine
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.errors import UserError
from flowtrain.tools.archive.stack import LARGEST_SIZE, Stack, finite, scale, unscale, whole

# Precision of a slope. The coder's own precision is 24 bits; a size of n loses n / 2**24 of it.
SLOPE_BITS = 9
CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units
MATRIX_BITS = 14  # precision of the triangular factors of a 1x1 convolution
PREDICTED_BITS = 12  # precision of the networks' predictions

Index = tuple[slice | Tensor | EllipsisType, ...]

# Values, the context of the layer (float64), and the stack of bits, to values.
Map = Callable[[Tensor, Tensor | None, Stack], Tensor]


class Rule(NamedTuple):
    """A layer in whole numbers: data to latent, and back."""

    forward: Map
    inverse: Map


def chain(rules: list[Rule]) -> Rule:
    """Rules one after the other."""

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        for each in rules:
            x = each.forward(x, context, stack)
        return x

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        for each in reversed(rules):
            z = each.inverse(z, context, stack)
        return z

    return Rule(forward, inverse)


def monotone(
    function: Callable[[Tensor], Tensor], approximate_inverse: Callable[[Tensor], Tensor], bits: int
) -> Rule:
    """An increasing function of one entry, made linear within cells of `2**CELL_BITS` units.

    The lower edge of cell b is mapped to `function(edge)`, rounded, plus b units. So no cell
    becomes empty, however flat the function is.
    """
    width = torch.tensor(2**CELL_BITS)

    def edge(cell: Tensor) -> Tensor:
        return whole(function(cell.double() * 2.0 ** (CELL_BITS - bits)), bits) + cell

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        cell = x >> CELL_BITS
        lower, upper = edge(cell), edge(cell + 1)
        return lower + scale(x - (cell << CELL_BITS), upper - lower, width, stack)

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        # Without the slope that was added, x would be `end`; with it, x is between there and zero.
        end = approximate_inverse(z.double() * 2.0**-bits) * 2.0 ** (bits - CELL_BITS)
        low, high = end.clamp(max=0).floor().long() - 2, end.clamp(min=0).ceil().long() + 2
        while (high - low > 1).any():
            middle = (low + high) >> 1
            below = edge(middle) <= z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        lower, upper = edge(low), edge(low + 1)
        return (low << CELL_BITS) + unscale(z - lower, upper - lower, width, stack)

    return Rule(forward, inverse)


def shifted(shift: Tensor, bits: int) -> Rule:
    """`x + shift`, which takes no bits."""
    units = whole(finite(shift), bits)
    return Rule(lambda x, context, stack: x + units, lambda z, context, stack: z - units)


def scaled(numerator: Tensor, denominator: Tensor) -> Rule:
    """`x * numerator / denominator`, broadcast."""
    return Rule(
        lambda x, context, stack: scale(x, numerator, denominator, stack),
        lambda z, context, stack: unscale(z, numerator, denominator, stack),
    )


def closest_fractions(slope: Tensor) -> tuple[Tensor, Tensor]:
    """The closest fractions of small numbers: numerators and denominators, of the slope's shape.

    Raises `UserError` for slopes beyond the largest symbol of the stack.
    """
    if not ((finite(slope) <= LARGEST_SIZE) & (slope >= 1 / LARGEST_SIZE)).all():
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
def transform_rule(transform: Transform, parameters: Tensor, bits: int) -> Rule:
    """The map of the entries for these parameters. The rule of affine transforms is exact."""
    return monotone(
        lambda x: transform.forward(x, parameters)[0],
        lambda z: transform.inverse(z, parameters)[0],
        bits,
    )


@transform_rule.register
def _(transform: Affine, parameters: Tensor, bits: int) -> Rule:
    """`(x + shift) exp(log_scale)`, with denominators that are powers of 2."""
    shift, raw = parameters.chunk(2, dim=1)
    log_scale = transform.log_scale(raw)
    exponent = (log_scale / math.log(2)).ceil().long()
    places = (SLOPE_BITS - exponent).clamp(0, 22)
    denominator = torch.ones_like(places) << places
    numerator = (log_scale.exp() * denominator).round().long().clamp(min=1)
    return chain([shifted(shift, bits), scaled(numerator, denominator)])


@transform_rule.register
def _(transform: AdditiveTransform, parameters: Tensor, bits: int) -> Rule:
    return shifted(parameters, bits)


# --- layers ---------------------------------------------------------------------------------------


@singledispatch
def rule(layer: Bijection, bits: int) -> Rule:
    """The rule of a layer, in units of `2**-bits`. Raises `UserError` for a kind that has none."""
    raise UserError(f"compress: a layer of the model has no coding rule: {type(layer).__name__}")


@rule.register
def _(layer: Sequential, bits: int) -> Rule:
    layers: list[Bijection] = list(layer.layers)  # type: ignore[arg-type]
    return chain([rule(each, bits) for each in fuse(layers, "forward")])


@rule.register
def _(layer: Multiscale, bits: int) -> Rule:
    levels = [
        chain([rule(level, bits), rule(prior, bits)])  # type: ignore[arg-type]
        for level, prior in zip(layer.levels, layer.priors, strict=True)
    ]

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        latents = []
        for level, (channels, _, _) in zip(levels, layer.latent_shapes, strict=True):
            x = level.forward(x, context, stack)
            x, latent = torch.split(x, [x.shape[1] - channels, channels], dim=1)
            latents.append(latent.flatten(1))
        return torch.cat(latents, dim=1)

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        latents = layer.split_latents(z)
        x = latents[-1][:, :0]
        for level, latent in zip(reversed(levels), reversed(latents), strict=True):
            x = level.inverse(torch.cat([x, latent], dim=1), context, stack)
        return x

    return Rule(forward, inverse)


@rule.register
def _(layer: Squeeze | Flatten | Permute | Reverse | HalvePixels, bits: int) -> Rule:
    return Rule(
        lambda x, context, stack: layer.forward(x)[0], lambda z, context, stack: layer.inverse(z)[0]
    )


@rule.register
def _(layer: Inverse, bits: int) -> Rule:
    inner = rule(layer.bijection, bits)
    return Rule(inner.inverse, inner.forward)


@rule.register
def _(layer: LogisticToNormal, bits: int) -> Rule:
    return monotone(lambda x: layer.forward(x)[0], lambda z: layer.inverse(z)[0], bits)


@rule.register
def _(layer: DiagonalAffine, bits: int) -> Rule:
    slope = closest_fractions(layer.bounded_log_scale().exp())
    return chain([scaled(*slope), shifted(layer.shift, bits)])


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """A product in whole numbers, where the order of a sum is irrelevant, in units of `x`."""
    product: Tensor = matrix @ x
    return torch.bitwise_right_shift(product + 2 ** (MATRIX_BITS - 1), MATRIX_BITS)


def _linear(weight: Tensor, bias: Tensor, bits: int) -> Rule:
    """`W x + b` at every pixel, where `W = P L D U`. Unit triangular L and U take no bits."""
    permutation, lower, upper = torch.linalg.lu(finite(weight))
    entries = upper.diagonal()
    if not (entries != 0).all():
        raise FloatingPointError("a 1x1 convolution is singular")
    order = permutation.argmax(dim=1)  # row i of P L takes row order[i] of L
    lower = whole(lower.tril(-1), MATRIX_BITS)
    upper = whole((upper / entries[:, None]).triu(1), MATRIX_BITS)
    sign: Tensor = entries.sign().long()[:, None]
    diagonal = scaled(*closest_fractions(entries.abs()[:, None]))
    bias = whole(finite(bias), bits)[:, None]

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        y = x.flatten(2)
        y = diagonal.forward(sign * (y + _product(upper, y)), None, stack)
        y = y + _product(lower, y)
        return (y[:, order] + bias).view_as(x)

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        y = torch.empty_like(z.flatten(2))
        y[:, order] = z.flatten(2) - bias
        channels = range(y.shape[1])
        for i in channels:  # y[:, :i] is right already
            y[:, i] -= _product(lower[i : i + 1, :i], y[:, :i])[:, 0]
        y = sign * diagonal.inverse(y, None, stack)
        for i in reversed(channels):
            y[:, i] -= _product(upper[i : i + 1, i + 1 :], y[:, i + 1 :])[:, 0]
        return y.view_as(z)

    return Rule(forward, inverse)


@rule.register
def _(layer: FusedLinear, bits: int) -> Rule:
    weight, bias, _ = layer.tensors()
    return _linear(weight, bias, bits)


@rule.register
def _(layer: LinearChannels, bits: int) -> Rule:
    weight = layer.mixing_matrix()
    return _linear(weight, torch.zeros_like(weight[0]), bits)


def _rounded(predicted: Tensor) -> Tensor:
    """Predictions of a network, as multiples of `2**-PREDICTED_BITS`."""
    unit = 2.0**PREDICTED_BITS
    return (finite(predicted) * unit).round() / unit


def _of_image(context: Tensor | None, i: int) -> Tensor | None:
    return None if context is None else context[i : i + 1]


def _coupling(
    layer: Coupling | CheckerboardCoupling, changed: Index, of_pixels: Index, bits: int
) -> Rule:
    """A coupling. `changed` selects the entries that it transforms, and `of_pixels` the predictions
    for them. The predictions of each image are computed by themselves.
    """

    def entries(x: Tensor, context: Tensor | None) -> Rule:
        real = x.double() * 2.0**-bits
        each = [layer.predict(real[i : i + 1], _of_image(context, i)) for i in range(len(x))]
        return transform_rule(layer.transform, _rounded(torch.cat(each)[of_pixels]), bits)

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        z = x.clone()
        z[changed] = entries(x, context).forward(x[changed], None, stack)
        return z

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        x = z.clone()
        x[changed] = entries(z, context).inverse(z[changed], None, stack)
        return x

    return Rule(forward, inverse)


@rule.register
def _(layer: Coupling, bits: int) -> Rule:
    changed = slice(None, -layer.kept) if layer.swap else slice(layer.kept, None)
    return _coupling(layer, (slice(None), changed), (), bits)


@rule.register
def _(layer: CheckerboardCoupling, bits: int) -> Rule:
    return _coupling(layer, (..., ~layer.keep), (..., ~layer.keep), bits)


@rule.register
def _(layer: TokenAutoregressive, bits: int) -> Rule:
    """Both directions predict one token after the other, by the same arithmetic. A stack is last
    in, first out, so `forward` changes the last token first.
    """

    def predictions(batch: int, context: Tensor | None) -> Callable[[Tensor | None], Rule]:
        """From the token before, `(B, E)`, the rule of the next one."""
        by_image = [layer.conditioner.by_token(1, _of_image(context, i)) for i in range(batch)]

        def following(before: Tensor | None) -> Rule:
            real = [None] * batch if before is None else before.double().mul(2.0**-bits)
            each = [
                predict(None if token is None else token[None])
                for predict, token in zip(by_image, real, strict=True)
            ]
            return transform_rule(layer.transform, _rounded(torch.cat(each)), bits)

        return following

    def forward(x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        following = predictions(len(x), context)
        tokens = x.flatten(2).unbind(dim=2)
        rules = [following(before) for before in (None, *tokens[:-1])]
        pairs = reversed(list(zip(rules, tokens, strict=True)))
        changed = [entries.forward(token, None, stack) for entries, token in pairs]
        return torch.stack(changed[::-1], dim=2).view_as(x)

    def inverse(z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        following = predictions(len(z), context)
        tokens: list[Tensor] = []
        for target in z.flatten(2).unbind(dim=2):
            entries = following(tokens[-1] if tokens else None)
            tokens.append(entries.inverse(target, None, stack))
        return torch.stack(tokens, dim=2).view_as(z)

    return Rule(forward, inverse)

"""One rule per kind of layer: what it does with whole numbers and a stack of bits.

All values are int64, in units of `2**-bits`; `context` is the layer's own, float64.
"""

from collections.abc import Callable
from functools import singledispatch
from types import EllipsisType

import torch
from torch import Tensor

from flowtrain.bijections import (
    ActNorm,
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
)
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.errors import UserError
from flowtrain.tools.archive.elementwise import Diagonal, Monotone, Rule, finite, transform_rule
from flowtrain.tools.archive.stack import Stack, whole

MATRIX_BITS = 14  # precision of the triangular factors of a 1x1 convolution
PREDICTED_BITS = 12  # precision of what networks predict

Index = tuple[slice | Tensor | EllipsisType, ...]


@singledispatch
def rule(layer: Bijection, bits: int) -> Rule:
    """The rule of a layer, in units of `2**-bits`. Raises `UserError` for a kind that has none."""
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


@rule.register
def _(layer: LogisticToNormal, bits: int) -> Rule:
    return Monotone(lambda x: layer.forward(x)[0], lambda z: layer.inverse(z)[0], bits)


@rule.register
def _(layer: DiagonalAffine | ActNorm, bits: int) -> Rule:
    return Diagonal(layer.bounded_log_scale().exp(), layer.shift, bits)


class Linear:
    """`W x + b` at every pixel, where `W = P L D U` with unit triangular L and U.

    L and U are chains of shifts, which take no bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, bits: int):
        permutation, lower, upper = torch.linalg.lu(finite(weight))
        diagonal = upper.diagonal()
        if not (diagonal != 0).all():
            raise FloatingPointError("a 1x1 convolution is singular")
        self.order = permutation.argmax(dim=1)  # row i of P L takes row order[i] of L
        self.lower = whole(lower.tril(-1), MATRIX_BITS)
        self.upper = whole((upper / diagonal[:, None]).triu(1), MATRIX_BITS)
        self.sign: Tensor = diagonal.sign().long()[:, None]
        self.diagonal = Diagonal(diagonal.abs()[:, None], torch.zeros(len(diagonal), 1), bits)
        self.bias = whole(finite(bias), bits)[:, None]

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
    return (finite(predicted) * unit).round() / unit


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

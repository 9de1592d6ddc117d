"""Images through a flow and onto a stack of bits, exactly: local bits-back coding in whole numbers.

Local bits-back coding (Ho, Lohn & Abbeel 2019, "Compression with Flows via Local Bits-Back Coding") codes with a
continuous flow, layer by layer: a layer that stretches space by |det J| takes `log2 |det J|` bits off the stack, as
noise below the resolution of its output, and one that shrinks it puts as many there. The paper's noise is Gaussian, far
wider than the grid of the values, and each layer is linearized within its reach. Here it is uniform within one cell of
the grid (Zhang et al. 2021, "iFlow: Numerically Invertible Flows for Efficient Lossless Compression via a Uniform
Coder"): whole shifts (additive couplings, the triangular factors of a 1x1 convolution) take no bits at all, less is
borrowed at the start, and each layer is a bijection of values and stack together.

All values are whole numbers, int64, in units of `2**-bits`. Networks compute in float64, for each image by itself, and
what they predict is rounded to `2**-PREDICTED_BITS` before it is used. So neither batch nor threads change an archive.
"""

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from functools import singledispatch
from typing import Any, Protocol

import numpy as np
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
from flowtrain.errors import RunError, UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise

DATA_BITS = 20  # of the data path
PARTS = 2**12  # of a level: the noise in it is one of them
GROUP_BITS = 2  # the dequantizer's map is linear within groups of 2**2 parts
NOISE_BITS = 14  # of variational noise before it is squeezed into its level; a part is ten units or more
PREDICTED_BITS = 12  # of what networks predict
SLOPE_BITS = 9  # of a slope; the coder's own precision is 24 bits, of which a size of n loses n / 2**24
MATRIX_BITS = 14  # of the triangular factors of a 1x1 convolution
CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units
NORMAL_CELLS = 32  # in a standard deviation of a normal distribution, within which it is uniform
LATENT_REACH = 64  # standard deviations: a latent further out cannot be coded. None takes more than 24 bits and a few
NOISE_REACH = 6  # of the normal numbers that become variational noise
SQUEEZED_REACH = 16  # and of what the noise's flow makes of them
LARGEST_SIZE = 2**24
PARTS_OF_LAYER = 4  # in which its entries are coded
ENOUGH = 64  # bits that are never taken off the stack


class Uncodable(RunError):
    """Some images of a batch are out of the coder's range: `images`, bool `(B,)`."""

    def __init__(self, images: Tensor):
        super().__init__(f"{int(images.sum())} images are out of range")
        self.images = images


class Exhausted(RunError):
    """There are not enough bits on the stack to borrow from."""

    def __init__(self) -> None:
        super().__init__("there are not enough bits to borrow from")


def constriction() -> Any:
    """The entropy coder's package. Raises `UserError` where it is not installed."""
    try:
        import constriction  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("compression needs the package constriction: pip install 'flowtrain[compress]'") from None
    return constriction


class Stack:
    """A stack of bits: an ANS coder (Duda 2013; `constriction`) that starts with `words`, uint32.

    To pop a symbol that was never pushed draws it from its distribution, and pushing it again puts the bits back.
    With `again`, the words are what `words()` of another stack has given; otherwise any.
    """

    def __init__(self, words: np.ndarray, again: bool = False):
        stream = constriction().stream
        self.coder = stream.stack.AnsCoder(words, seal=not again)
        self.uniform = stream.model.Uniform()
        self.gaussian = stream.model.QuantizedGaussian
        self.lowest = self.bits  # the least number of bits that there were

    @property
    def bits(self) -> int:
        return self.coder.num_valid_bits()

    def words(self) -> np.ndarray:
        """All that is on the stack now, uint32."""
        return self.coder.get_compressed()

    def first_words(self) -> np.ndarray:
        """The words that the first stack began with, once all else is popped. Raises `ValueError` if it is not."""
        return self.coder.get_compressed(unseal=True)

    def copy(self) -> "Stack":
        other = copy.copy(self)
        other.coder = self.coder.clone()
        return other

    def pop(self, sizes: Tensor) -> Tensor:
        """Uniform whole numbers in `[0, sizes)`, of its shape, `(B, ...)`. Raises `Uncodable`, `Exhausted`."""
        sizes, real = _sizes(sizes)
        values = torch.zeros_like(sizes)
        values[real] = torch.from_numpy(self.coder.decode(self.uniform, _int32(sizes[real]))).long()
        self._popped()
        return values

    def push(self, values: Tensor, sizes: Tensor) -> None:
        """The inverse of `pop`."""
        sizes, real = _sizes(sizes)
        self.coder.encode_reverse(_int32(values[real]), self.uniform, _int32(sizes[real]))

    def pop_normal(self, shape: tuple[int, ...], bits: int, reach: int) -> Tensor:
        """Standard normal numbers, `shape`, in units of `2**-bits`, none further out than `reach`."""
        cells = torch.from_numpy(self.coder.decode(self._normal(reach), math.prod(shape))).long().view(shape)
        size = torch.full(shape, 2**bits // NORMAL_CELLS)
        return cells * size + self.pop(size)

    def push_normal(self, z: Tensor, bits: int, reach: int) -> None:
        """The inverse of `pop_normal`. Raises `Uncodable` beyond `reach`."""
        size = torch.full_like(z, 2**bits // NORMAL_CELLS)
        cells = z.div(size, rounding_mode="floor")
        _require((cells >= -NORMAL_CELLS * reach) & (cells < NORMAL_CELLS * reach))
        self.push(z - cells * size, size)
        self.coder.encode_reverse(_int32(cells.flatten()), self._normal(reach))

    def _normal(self, reach: int) -> Any:
        # A cell's number stands for its lower edge, hence the half.
        return self.gaussian(-NORMAL_CELLS * reach, NORMAL_CELLS * reach - 1, -0.5, float(NORMAL_CELLS))

    def _popped(self) -> None:
        self.lowest = min(self.lowest, self.bits)
        if self.lowest < ENOUGH:
            raise Exhausted


def _sizes(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The sizes, and which of them take any bits: a symbol of one value is not coded."""
    _require((sizes >= 1) & (sizes <= LARGEST_SIZE))
    return sizes, sizes > 1


def _require(fine: Tensor) -> None:
    bad = ~fine.flatten(1).all(dim=1)
    if bad.any():
        raise Uncodable(bad)


def _int32(values: Tensor) -> np.ndarray:
    return values.to(torch.int32).numpy()


# --- one entry at a time ----------------------------------------------------------------------------------------------


def scale(x: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """`x * numerator / denominator` as a bijection (Zhang et al. 2021, algorithm 1): all `(B, ...)` of one shape."""
    parts = []
    for x_, n, d in _parts(x, numerator, denominator):
        y = x_ * n + stack.pop(n)
        parts.append(y.div(d, rounding_mode="floor"))
        stack.push(y - parts[-1] * d, d)
    return torch.cat(parts, dim=1).view_as(x)


def unscale(z: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """The inverse of `scale`."""
    parts = []
    for z_, n, d in reversed(_parts(z, numerator, denominator)):
        y = z_ * d + stack.pop(d)
        parts.append(y.div(n, rounding_mode="floor"))
        stack.push(y - parts[-1] * n, n)
    return torch.cat(parts[::-1], dim=1).view_as(z)


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """A few entries after the other: so that what is only borrowed for a moment is less."""
    return list(zip(*(t.flatten(1).chunk(PARTS_OF_LAYER, dim=1) for t in tensors), strict=True))


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
        large = Fraction(max(value, 1 / value)).limit_denominator(max(1, int(limit * min(value, 1 / value))))
        fractions.append(large if value >= 1 else 1 / large)
    numerator, denominator = torch.tensor([(f.numerator, f.denominator) for f in fractions]).unbind(1)
    return numerator.view_as(slope), denominator.view_as(slope)


def _whole(x: Tensor, bits: int) -> Tensor:
    return (x * 2**bits).round().long()


class Monotone:
    """An increasing map of one entry, made linear within cells of `2**CELL_BITS` units.

    A cell's lower edge, number `b`, is mapped to `f(edge)`, rounded, plus b units: so no cell becomes empty, however
    flat f is, and the slope is larger by `2**-CELL_BITS`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], bits: int):
        self.function = function
        self.approximate_inverse = inverse
        self.bits = bits

    def _edge(self, cell: Tensor) -> Tensor:
        return _whole(self.function(cell.double() * 2.0 ** (CELL_BITS - self.bits)), self.bits) + cell

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        cell = x >> CELL_BITS
        lower, upper = self._edge(cell), self._edge(cell + 1)
        width = torch.full_like(x, 2**CELL_BITS)
        return lower + scale(x - (cell << CELL_BITS), upper - lower, width, stack)

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        # Without the slope that was added x would be `end`; with it, it is between there and zero.
        end = self.approximate_inverse(z.double() * 2.0**-self.bits) * 2.0 ** (self.bits - CELL_BITS)
        low, high = end.clamp(max=0).floor().long() - 2, end.clamp(min=0).ceil().long() + 2
        while (high - low > 1).any():
            middle = (low + high) >> 1
            below = self._edge(middle) <= z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        lower, upper = self._edge(low), self._edge(low + 1)
        width = torch.full_like(z, 2**CELL_BITS)
        return (low << CELL_BITS) + unscale(z - lower, upper - lower, width, stack)


# --- layers -----------------------------------------------------------------------------------------------------------


class Rule(Protocol):
    """A layer in whole numbers. `forward` is data to latent; `context` is that of the layer, float64."""

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor: ...


@singledispatch
def rule(layer: Bijection, bits: int) -> Rule:
    """The rule of a layer, in units of `2**-bits`. Raises `UserError` for a kind of layer that has none."""
    raise UserError(f"compress: a layer of the model is of a kind that has no coding rule: {type(layer).__name__}")


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
        self.shift = _whole(_finite(shift), bits)

    def forward(self, x: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return scale(x, self.numerator.expand_as(x), self.denominator.expand_as(x), stack) + self.shift

    def inverse(self, z: Tensor, context: Tensor | None, stack: Stack) -> Tensor:
        return unscale(z - self.shift, self.numerator.expand_as(z), self.denominator.expand_as(z), stack)


@rule.register
def _(layer: DiagonalAffine | ActNorm, bits: int) -> Rule:
    slope = layer.bounded_log_scale().exp()
    return Diagonal(slope, layer.shift, bits)


class Linear:
    """`W x + b` at every pixel, `W = P L D U` with unit triangular L and U: they are shifts, and take no bits."""

    def __init__(self, weight: Tensor, bias: Tensor, bits: int):
        permutation, lower, upper = torch.linalg.lu(_finite(weight))
        diagonal = upper.diagonal()
        if not (diagonal != 0).all():
            raise FloatingPointError("a 1x1 convolution is singular")
        self.order = permutation.argmax(dim=1)  # row i of P L takes row order[i] of L
        self.lower = _whole(lower.tril(-1), MATRIX_BITS)
        self.upper = _whole((upper / diagonal[:, None]).triu(1), MATRIX_BITS)
        self.sign = diagonal.sign().long()[:, None]
        self.diagonal = Diagonal(diagonal.abs()[:, None], torch.zeros(len(diagonal), 1), bits)
        self.bias = _whole(_finite(bias), bits)[:, None]

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
    weight = layer.weight()
    return Linear(weight, torch.zeros_like(weight[0]), bits)


class Conditioned:
    """A coupling: `changed` selects the entries that are transformed, `of_pixels` theirs of the predicted."""

    def __init__(self, layer: Coupling | CheckerboardCoupling, changed: tuple, of_pixels: tuple, bits: int):
        self.layer = layer
        self.changed = changed
        self.of_pixels = of_pixels
        self.entries = entries(layer.transform, bits)
        self.bits = bits

    def _predicted(self, x: Tensor, context: Tensor | None) -> Tensor:
        real = x.double() * 2.0**-self.bits
        each = [
            self.layer._predicted(real[i : i + 1], None if context is None else context[i : i + 1])
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


# --- transforms of couplings ------------------------------------------------------------------------------------------


@singledispatch
def entries(transform: Transform, bits: int) -> Callable[[Tensor], Any]:
    """What a coupling does with its entries, given the parameters: an object with `forward` and `inverse`.

    Any transform has a rule, for it is increasing; those that are affine have one that is exact.
    """
    return lambda parameters: Monotone(
        lambda x: transform.forward(x, parameters)[0], lambda z: transform.inverse(z, parameters)[0], bits
    )


class Affine:
    """`AffineTransform`: the slopes are fractions, so that it is a shift and a `scale`."""

    def __init__(self, parameters: Tensor, limit: float, bits: int):
        shift, raw = parameters.chunk(2, dim=1)
        self.shift = _whole(shift, bits)
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
        self.shift = _whole(shift, bits)

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        return x + self.shift

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        return z - self.shift


@entries.register
def _(transform: AdditiveTransform, bits: int) -> Callable[[Tensor], Any]:
    return lambda parameters: Additive(parameters, bits)


# --- the whole model --------------------------------------------------------------------------------------------------


class Uniform:
    """Uniform noise."""

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        """Levels `(B, C, H, W)` to the part of each, in `[0, PARTS)`, which is drawn from the stack."""
        return stack.pop(torch.full_like(x, PARTS))

    def push(self, part: Tensor, x: Tensor, stack: Stack) -> None:
        """The inverse: the noise, given the levels, goes back onto the stack."""
        stack.push(part, torch.full_like(x, PARTS))


class Variational:
    """Noise that a flow makes of normal numbers, given the image, and the normal distribution function of it.

    The last is a table of the numbers' bins, in each of which they are uniform.
    """

    def __init__(self, noise_model: VariationalNoise, levels: int):
        self.model = noise_model
        self.levels = levels
        self.squeeze = rule(noise_model.squeeze, NOISE_BITS)
        self.flow = rule(noise_model.flow, NOISE_BITS)
        quantiles = torch.special.ndtri(torch.arange(1, PARTS, dtype=torch.float64) / PARTS)
        reach = torch.tensor([SQUEEZED_REACH * 2**NOISE_BITS])
        self.edges = torch.cat([-reach, _whole(quantiles, NOISE_BITS), reach])

    def _context(self, x: Tensor) -> Tensor:
        scaled = self.model.squeeze(x.double() / self.levels - 0.5)[0]
        return torch.cat([self.model.context(each[None]) for each in scaled])

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        eps = stack.pop_normal(tuple(self.model.squeeze(x)[0].shape), NOISE_BITS, NOISE_REACH)
        w = self.flow.forward(eps, self._context(x), stack)
        _require((w >= self.edges[0]) & (w < self.edges[-1]))
        part = torch.searchsorted(self.edges, w, right=True) - 1
        stack.push(w - self.edges[part], self.edges[part + 1] - self.edges[part])
        return self.model.squeeze.inverse(part)[0]

    def push(self, part: Tensor, x: Tensor, stack: Stack) -> None:
        part = self.model.squeeze(part)[0]
        w = self.edges[part] + stack.pop(self.edges[part + 1] - self.edges[part])
        stack.push_normal(self.flow.inverse(w, self._context(x), stack), NOISE_BITS, NOISE_REACH)


class Codec:
    """A flow as an exact map between images and bits on a stack. It computes on the CPU.

    Raises `UserError` where a layer has no rule, and for a model of real-valued data or with classes.
    """

    def __init__(self, flow: Flow):
        if flow.levels is None:
            raise UserError("compress: a model of real-valued data has no bits without loss")
        if flow.classes:
            raise UserError(
                f"compress: the model is class-conditional (model.classes is {flow.classes}): no coding rule"
            )
        self.shape, self.dims, self.levels = flow.shape, flow.dims, flow.levels
        flow = copy.deepcopy(flow).to("cpu", torch.float64).eval().requires_grad_(False)
        noise = flow.dequantizer.noise_model
        self.noise = Variational(noise, self.levels) if isinstance(noise, VariationalNoise) else Uniform()
        # The dequantizer's map, of the lower edge of each group: `middle(x)` is that of x + 1/2.
        groups = torch.arange(self.levels * PARTS // 2**GROUP_BITS + 1, dtype=torch.float64)
        edges = flow.dequantizer.middle(groups * 2**GROUP_BITS / PARTS - 0.5, torch.float64)
        self.edges = _whole(edges, DATA_BITS)
        self.flow = rule(flow.bijection, DATA_BITS)

    def encode(self, x: Tensor, stack: Stack) -> None:
        """Images, uint8 `(B, C, H, W)`, onto the stack. Raises `Uncodable`, `Exhausted`: the stack is then useless."""
        stack.push_normal(self.forward(x, stack), DATA_BITS, LATENT_REACH)

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        """Images to latents, `(B, D)` int64: `encode` without its last step."""
        x = x.long()
        y = x * PARTS + self.noise.pop(x, stack)
        group = y >> GROUP_BITS
        v = self.edges[group] + scale(y - (group << GROUP_BITS), *self._slope(group), stack)
        return self.flow.forward(v, None, stack)

    def decode(self, count: int, stack: Stack) -> Tensor:
        """The inverse of `encode`: uint8 `(count, C, H, W)`.

        What the stack is left with is only then what `encode` began with if all was computed to the same bits.
        Raises `Uncodable` or `Exhausted` where it plainly was not.
        """
        z = stack.pop_normal((count, self.dims), DATA_BITS, LATENT_REACH)
        v = self.flow.inverse(z, None, stack)
        _require((v >= self.edges[0]) & (v < self.edges[-1]))
        group = torch.searchsorted(self.edges, v, right=True) - 1
        y = (group << GROUP_BITS) + unscale(v - self.edges[group], *self._slope(group), stack)
        x = y.div(PARTS, rounding_mode="floor")
        self.noise.push(y - x * PARTS, x, stack)
        return x.to(torch.uint8)

    def _slope(self, group: Tensor) -> tuple[Tensor, Tensor]:
        return self.edges[group + 1] - self.edges[group], torch.full_like(group, 2**GROUP_BITS)

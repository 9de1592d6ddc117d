"""Autoregressive models of the levels of an image, as flows (Nielsen & Winther 2020,
arXiv:2002.02547, "Closing the Dequantization Gap: PixelCNN as a Single-Layer Flow").

The layer is here, with the interface of its networks, which are in `nets/causal.py`. They work on
tokens: square patches of an image, in raster order. A token of r x r pixels has E = C r^2 entries,
ordered by channel, row and column.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import (
    Bijection,
    DataDependentInit,
    Direction,
    bounded,
    sum_per_example,
    unbounded,
)
from flowtrain.bijections.context import Context, Guided
from flowtrain.bijections.discretized import ROOT_TAU, DiscretizedMixture, Entry
from flowtrain.bijections.orders import in_some_order
from flowtrain.bijections.precision import apply_conditioner, full_precision, has_float64, inside
from flowtrain.system.threads import one_thread


class ByToken(Protocol):
    """A network of a batch that computes token after token, in raster order."""

    def start(self, i: int, j: int) -> None:
        """Begins with token `(i, j)`."""

    def end(self, i: int, j: int) -> None:
        """Ends token `(i, j)`, of which everything is known."""


class PredictionByToken(ByToken, Protocol):
    def mean(self, d: int) -> Tensor:
        """The prediction `(B,)` of entry d. The values of the entries before it are known."""


class NetByToken(ByToken, Protocol):
    def parameters(self, d: int) -> Tensor:
        """The parameters `(P, B)` of entry d. The inputs that they depend on are known."""


class Prediction(nn.Module):
    """Predicts each entry of tokens, `(B, E, H, W)`, linearly from entries before it."""

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def fit(self, x: Tensor) -> Tensor:
        """Sets the weights from tokens `(B, E, H, W)`. Returns the residuals' deviations `(E,)`."""
        raise NotImplementedError

    def by_token(self, values: Tensor) -> PredictionByToken:
        """The same, token by token. The caller writes a token's values into `values` `(E, B)`."""
        raise NotImplementedError


class TokenNet(nn.Module):
    """Maps values, residuals and predictions of entries `(B, 3E, H, W)` to `(B, P E, H, W)`.

    The parameters of an entry depend on its prediction, and on the other inputs of entries before
    it: all of earlier tokens, in raster order, and the first ones of its own token.

    It is called as `net(x, context, noise)`. A training step passes the `noise`, `(B, ...)`:
    numbers of each example that change with the step, for dropout.
    """

    orders = 1  # in which it has learned to read an image, each given its `order_context`

    def by_token(self, seen: Tensor, context: Tensor | None = None) -> NetByToken:
        """The same, token by token. The caller writes a token's inputs into `seen` `(3E, B)`."""
        raise NotImplementedError


class _GuidedByToken:
    """The parameters of a batch in a guided context. See `NetByToken`."""

    def __init__(self, net: TokenNet, seen: Tensor, context: Guided):
        self.context = context
        self.given = net.by_token(seen, context.given)
        self.without = net.by_token(seen, context.without)

    def start(self, i: int, j: int) -> None:
        self.given.start(i, j)
        self.without.start(i, j)

    def parameters(self, d: int) -> Tensor:
        return self.context.extrapolated(self.given.parameters(d), self.without.parameters(d))

    def end(self, i: int, j: int) -> None:
        self.given.end(i, j)
        self.without.end(i, j)


class OrdinalAutoregressive(DataDependentInit):
    """`z_d = Phi^-1(F(x_d | x_<d) + u_d P(x_d | x_<d))` of dequantized images (eq. 6).

    An image with Q >= 2 levels is `v = (x + u) / Q - 1/2`, where x are the levels and u is noise in
    [0, 1). F and P are the distribution function and the probabilities of an entry's level. The
    networks that predict them read x alone, so the Jacobian is diagonal almost everywhere, and

        log N(z; 0, I) + log|det dz/dv| = log P(x) + D log Q

    for any noise: the likelihood of the image is exact.

    The distribution is a mixture relative to a linear prediction from earlier entries, in units of
    the standard deviation of its residual. `set_from` sets both by least squares. The networks
    see the levels, scaled to [-1, 1], the residuals, and the predictions.

    `forward` is one pass of the networks. `inverse` computes one entry after the other in full
    precision, differentiable with respect to z, but not to the parameters. If the sides are no
    multiples of the token's r, the last row and column are repeated. These entries have no part in
    the likelihood, and sampling copies them.
    """

    inverse_is_sequential = True
    is_discrete = True
    has_network = True
    reversible_in = ()  # all activations are inside of this one layer
    initialization_images = 200  # enough for the linear prediction

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_bins: int,
        token: int,
        prediction: Prediction,
        conditioner: TokenNet,
        mixture: DiscretizedMixture,
    ):
        super().__init__()
        self.shape, self.num_bins, self.token = shape, num_bins, token
        self.prediction = prediction
        self.conditioner = conditioner
        self.mixture = mixture
        entries = shape[0] * token**2
        self.log_scale = nn.Parameter(torch.zeros(entries, 1, 1))

    def _levels_of(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The levels, as real numbers without a gradient, and u, both `(B, C, H, W)`."""
        y = (v + 0.5) * self.num_bins
        x = y.floor().clamp_(0, self.num_bins - 1).detach()
        return x, y - x

    def _tokens(self, x: Tensor) -> Tensor:
        """An image `(B, C, H, W)` as tokens `(B, E, H', W')`."""
        below, right = (-side % self.token for side in self.shape[1:])
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return F.pixel_unshuffle(x, self.token)

    def _image(self, tokens: Tensor) -> Tensor:
        """The inverse of `_tokens`."""
        return F.pixel_shuffle(tokens, self.token)[..., : self.shape[1], : self.shape[2]]

    def _value(self, x: Tensor) -> Tensor:
        """Levels scaled to [-1, 1]."""
        return x * (2 / (self.num_bins - 1)) - 1

    def bounded_log_scale(self) -> Tensor:
        """The log-scales of the residuals of a token's entries, `(E, 1, 1)`."""
        return bounded(self.log_scale, LOG_SCALE_LIMIT)

    def set_from(self, x: Tensor) -> None:
        levels = self._tokens(self._levels_of(x[: self.initialization_images])[0])
        deviation = self.prediction.fit(self._value(levels))
        half_a_level = 1 / (self.num_bins - 1)  # entries that never vary have a scale, too
        log_scale = deviation.clamp(min=half_a_level).log()
        self.log_scale.copy_(unbounded(log_scale, LOG_SCALE_LIMIT)[:, None, None])

    def forward(
        self, v: Tensor, context: Context | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.by_entry(v, context, noise)
        constant = math.prod(self.shape) * math.log(self.num_bins)
        return z.flatten(1), sum_per_example(log_derivative) + constant

    def likelihood(self, v: Tensor, context: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of a training step, with zeros as latents, and a `log_det` to go with them.

        Before a normal base, it has the likelihood and the gradient of `forward`. Neither depends
        on the latents, so this saves them. If there are several `orders`, the noise in `v` chooses
        one for each image.
        """
        x, u = self._levels_of(v)
        if self.conditioner.orders > 1:
            x, context = in_some_order(x, u, self.conditioner.orders)
        x = self._tokens(x)
        location, log_scale, seen = self._linear(x)
        net = functools.partial(self.conditioner, noise=noise)
        parameters = inside(net, seen, context)  # the mixtures cast them, in parts
        log_prob = self._image(self.mixture.log_prob(x, location, log_scale, parameters))
        constant = math.prod(self.shape) * math.log(self.num_bins * ROOT_TAU)
        return torch.zeros_like(v).flatten(1), sum_per_example(log_prob) + constant

    def order(self) -> Tensor:
        """The places of the entries in the order of `in_order`, int64 `(C, H, W)`."""
        channels, height, width = self.shape
        r = self.token
        c, row, column = torch.meshgrid(*map(torch.arange, self.shape), indexing="ij")
        token = (row // r) * -(-width // r) + column // r
        return token * channels * r**2 + c * r**2 + (row % r) * r + column % r

    def log_probs(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The log-probability of each level given those before it, `(B, C, H, W)` in nats.

        It is differentiable with respect to the levels, which are real numbers here.
        """
        tokens = self._tokens(x)
        distribution = self._distributions(tokens, context)
        return self._image(self.mixture.log_prob(tokens, *distribution))

    def log_probs_of_all(
        self, x: Tensor, entries: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """`log_probs`, and the log-probabilities `(B, N, Q)` of all levels at `entries`, indices
        `(N,)` in the image.
        """
        tokens = self._tokens(x)
        location, log_scale, parameters = self._distributions(tokens, context)
        terms = self._image(self.mixture.log_prob(tokens, location, log_scale, parameters))
        # The places of the entries among the tokens, (E, H', W').
        (_, height, width), r = self.shape, self.token
        c, row = entries // (height * width), entries // width % height
        column = entries % width
        e = c * r**2 + row % r * r + column % r
        places = (e * tokens.shape[2] + row // r) * tokens.shape[3] + column // r
        count = self.mixture.parameters_per_entry
        of_entries = parameters.unflatten(1, (count, -1)).flatten(2)[:, :, places, None]
        size = (len(x), len(entries), self.num_bins)
        return terms, self.mixture.log_prob(
            torch.arange(self.num_bins, device=x.device).to(x).expand(size),
            location.flatten(1)[:, places, None],
            log_scale.flatten()[e, None],
            of_entries.expand(-1, -1, -1, self.num_bins).flatten(1, 2),
        )

    def by_entry(
        self, v: Tensor, context: Context | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents, and their log-derivatives with respect to x + u, both `(B, C, H, W)`."""
        x, u = map(self._tokens, self._levels_of(v))
        distribution = self._distributions(x, context, noise)
        z, log_derivative = self.mixture.forward(x, u, *distribution)
        return self._image(z), self._image(log_derivative)

    def _distributions(
        self, x: Tensor, context: Context | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Locations `(B, E, H, W)`, log-scales `(E, 1, 1)` and parameters `(B, P E, H, W)` for
        tokens `x` `(B, E, H, W)`, in levels. `noise` goes to the `TokenNet`.
        """
        location, log_scale, seen = self._linear(x)
        net = functools.partial(self.conditioner, noise=noise)
        return location, log_scale, apply_conditioner(net, seen, context)

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The linear prediction of tokens `x`: locations and log-scales of `_distributions`, and
        the inputs `(B, 3E, H, W)` of the networks.
        """
        self.require_initialized()
        value, log_scale = self._value(x), self.bounded_log_scale()
        with full_precision(x):
            predicted = self.prediction(value)
        residual = (value - predicted) * (-log_scale).exp()
        half = (self.num_bins - 1) / 2  # levels per unit of value
        seen = torch.cat([value, residual, predicted], dim=1)
        return (predicted + 1) * half, log_scale + math.log(half), seen

    def split_latents(self, z: Tensor) -> list[Tensor]:
        return [z.reshape(-1, *self.shape)]

    def untraceable_directions(self) -> list[Direction]:
        return ["inverse"]

    @one_thread()
    @torch.no_grad()
    def in_order(
        self, next_level: Callable[[Entry, int], Tensor], batch: int, context: Context | None = None
    ) -> Tensor:
        """Builds levels `(B, C, H, W)`, int64, one entry after the other, without gradients.

        `next_level` maps the distribution of an entry, and its index in the image, to its levels
        `(B,)`, int64. A second thread of torch costs time: there are thousands of small operations.
        """
        self.require_initialized()
        channels, height, width = self.shape
        r = self.token
        entries = channels * r**2
        half = (self.num_bins - 1) / 2  # levels per unit of value
        seen = self.log_scale.new_zeros(3 * entries, batch)
        values, residuals, predicted = seen.chunk(3)
        prediction = self.prediction.by_token(values)
        size = (-(-height // r), -(-width // r))
        net: NetByToken = (
            _GuidedByToken(self.conditioner, seen, context)
            if isinstance(context, Guided)
            else self.conditioner.by_token(seen, context)
        )
        distribution = self.mixture.one_entry(seen.device)
        value_of = self._value(torch.arange(self.num_bins, device=seen.device).to(seen))
        log_scales = self.bounded_log_scale().flatten()
        inverse_scales = (-log_scales).exp().tolist()
        log_scales_in_levels = (log_scales + math.log(half)).tolist()
        levels = torch.empty(channels * height * width, batch, dtype=torch.long).to(seen.device)
        for i, j in itertools.product(*map(range, size)):
            prediction.start(i, j)
            net.start(i, j)
            for d in range(entries):
                c, (dy, dx) = d // r**2, divmod(d % r**2, r)
                row, column = min(i * r + dy, height - 1), min(j * r + dx, width - 1)
                index = (c * height + row) * width + column
                predicted[d] = mean = prediction.mean(d)
                parameters = net.parameters(d)
                if (row, column) == (i * r + dy, j * r + dx):
                    entry = distribution(
                        (mean.double() + 1).mul_(half), log_scales_in_levels[d], parameters
                    )
                    levels[index] = next_level(entry, index)
                values[d] = value = value_of[levels[index]]
                residuals[d] = value.sub_(mean).mul_(inverse_scales[d])
            prediction.end(i, j)
            net.end(i, j)
        return levels.T.reshape(batch, *self.shape)

    def inverse(
        self,
        z: Tensor,
        context: Context | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[Tensor, Tensor]:
        if not has_float64(z):
            return self._on_the_cpu("inverse", z, context, progress)
        done = itertools.count(1)
        target = torch.special.ndtr(z.T.double())
        low, high = torch.empty_like(target), torch.empty_like(target)

        def next_level(entry: Entry, index: int) -> Tensor:
            level, low[index], high[index] = entry.find(target[index])
            progress(next(done) / len(target))
            return level

        with full_precision(z):
            x = self.in_order(next_level, len(z), context).to(z)
        u = ((target - low) / (high - low)).clamp_(0, 1).T.to(z)
        # So far inside of its bin that rounding does not move it to another level.
        edge = 2 * self.num_bins * torch.finfo(z.dtype).eps
        v = (x + u.clamp(edge, 1 - edge).reshape(x.shape)) / self.num_bins - 0.5
        return v, -self._log_det(z, high - low)

    def forward_matching_inverse(
        self, v: Tensor, context: Context | None, progress: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        """`forward` by the arithmetic of `inverse`, which takes as long as `inverse`.

        The two paths of the networks round differently, and the range of an improbable level is as
        small as 2**-18. On noise, latents in batches of another size were off by up to 16% of half
        of their range by this (29% for a uniform part of 2**-11, 47% for 2**-12).
        """
        if not has_float64(v):
            return self._on_the_cpu("forward_matching_inverse", v, context, progress)
        x, u = (entries.flatten(1).T for entries in self._levels_of(v))
        levels = x.long().contiguous()
        done = itertools.count(1)
        low = torch.empty(levels.shape, dtype=torch.float64, device=v.device)
        high = torch.empty_like(low)

        def next_level(entry: Entry, index: int) -> Tensor:
            low[index], high[index] = entry.range(levels[index])
            progress(next(done) / len(levels))
            return levels[index]

        with full_precision(v):
            self.in_order(next_level, len(v), context)
        z = torch.special.ndtri(torch.lerp(low, high, u.double())).T.to(v)
        return z, self._log_det(z, high - low)

    def _on_the_cpu(
        self, method: str, x: Tensor, context: Context | None, *others: Any
    ) -> tuple[Tensor, Tensor]:
        """Calls a method of this layer on the CPU, because entries need double precision."""
        there = copy.deepcopy(self).cpu()
        context = None if context is None else context.to("cpu")
        result, log_det = getattr(there, method)(x.cpu(), context, *others)
        return result.to(x.device), log_det.to(x.device)

    def _log_det(self, z: Tensor, probability: Tensor) -> Tensor:
        """log_det of `forward`, from latents `(B, D)` and the levels' probabilities `(D, B)`."""
        log_density = -0.5 * z.square() - math.log(ROOT_TAU)
        log_derivative = probability.log().T.to(z) - log_density
        return sum_per_example(log_derivative) + z.shape[1] * math.log(self.num_bins)


def discrete_model(bijection: Bijection) -> OrdinalAutoregressive | None:
    """The bijection if it is a model of levels, with a distribution for each entry, or None."""
    return bijection if isinstance(bijection, OrdinalAutoregressive) else None

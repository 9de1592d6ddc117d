"""Autoregressive models of the levels of an image, as flows (Nielsen & Winther 2020, "Closing the
Dequantization Gap: PixelCNN as a Single-Layer Flow").
"""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import SetFromData, sum_per_example
from flowtrain.bijections.discretized import DiscretizedMixture
from flowtrain.bijections.precision import apply_conditioner, full_precision


class PredictionByToken(Protocol):
    """The linear predictions of a batch, a token at a time in raster order."""

    def start(self, i: int, j: int) -> None:
        """Begins with token `(i, j)`."""

    def mean(self, d: int, values: Tensor) -> Tensor:
        """The prediction `(B,)` of entry d, from the token's values `(B, E)`. Later ones are 0."""

    def end(self, i: int, j: int, values: Tensor) -> None:
        """Takes the values `(B, E)` of token `(i, j)`."""


class Prediction(nn.Module):
    """Predicts each entry of tokens, `(B, E, H, W)`, linearly from entries before it."""

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def fit(self, x: Tensor) -> Tensor:
        """Sets the weights from tokens. Returns the standard deviations of the residuals `(E,)`."""
        raise NotImplementedError

    def by_token(self, batch: int) -> PredictionByToken:
        raise NotImplementedError


class NetByToken(Protocol):
    """The parameters of a batch, a token at a time in raster order."""

    def start(self, i: int, j: int) -> None:
        """Begins with token `(i, j)`."""

    def parameters(self, d: int, predicted: Tensor) -> Tensor:
        """The parameters `(B, P)` of entry d, from its prediction `(B,)`."""

    def known(self, d: int, value: Tensor, residual: Tensor) -> None:
        """Takes the value and the residual of entry d, both `(B,)`."""

    def end(self, i: int, j: int, values: Tensor, residuals: Tensor) -> None:
        """Takes all of token `(i, j)`, both `(B, E)`."""


class TokenNet(nn.Module):
    """Maps values, residuals and predictions of entries `(B, 3E, H, W)` to `(B, P E, H, W)`.

    The parameters of an entry depend on its prediction, and on the other inputs of entries before
    it: all of earlier tokens, in raster order, and the first ones of its own token.
    """

    def by_token(self, batch: int, context: Tensor | None = None) -> NetByToken:
        raise NotImplementedError


class OrdinalAutoregressive(SetFromData):
    """`z_d = Phi^-1(F(x_d | x_<d) + u_d P(x_d | x_<d))` of images `x + u` with Q levels (eq. 6)."""

    inverse_is_sequential = True

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int,
        token: int,
        prediction: Prediction,
        conditioner: TokenNet,
        mixture: DiscretizedMixture,
    ):
        super().__init__()
        self.shape, self.levels, self.token = shape, levels, token
        self.prediction = prediction
        self.conditioner = conditioner
        self.mixture = mixture
        entries = shape[0] * token**2
        self.log_scale = nn.Parameter(torch.zeros(entries, 1, 1))

    def _levels_of(self, v: Tensor) -> tuple[Tensor, Tensor]:
        y = (v + 0.5) * self.levels
        x = y.floor().clamp_(0, self.levels - 1).detach()
        return x, y - x

    def _tokens(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.token)

    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values in [-1, 1], `(B, E, H, W)`, and their predictions."""
        value = x * (2 / (self.levels - 1)) - 1
        with full_precision(x):
            return value, self.prediction(value)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        if self.initialized:
            return
        value = self._tokens(self._levels_of(x)[0]) * (2 / (self.levels - 1)) - 1
        deviation = self.prediction.fit(value)
        with torch.no_grad():
            self.log_scale.copy_(deviation.log()[:, None, None])
            self.initialized.fill_(True)

    def forward(self, v: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        x, u = map(self._tokens, self._levels_of(v))
        value, predicted = self._predicted(x)
        log_scale = self.log_scale
        residual = (value - predicted) * (-log_scale).exp()
        seen = torch.cat([value, residual, predicted], dim=1)
        parameters = apply_conditioner(self.conditioner, seen, context)
        half = (self.levels - 1) / 2
        z, log_derivative = self.mixture.forward(
            x, u, (predicted + 1) * half, log_scale + math.log(half), parameters
        )
        z = F.pixel_shuffle(z, self.token).flatten(1)
        constant = z.shape[1] * math.log(self.levels)
        return z, sum_per_example(log_derivative) + constant

    def in_order(
        self,
        next_level: Callable[[Tensor, int], Tensor],
        batch: int,
        context: Tensor | None = None,
    ) -> Tensor:
        """Builds levels `(B, C, H, W)` one entry after the other.

        `next_level` gets F(0), ..., F(Q) of an entry, `(B, Q + 1)` float64, and the entry's index
        in the image. It returns the entry's levels `(B,)`, real numbers.
        """
        channels, height, width = self.shape
        r = self.token
        entries = channels * r**2
        x = self.log_scale.new_empty(batch, channels * height * width)
        log_scale = self.log_scale.flatten()
        half = (self.levels - 1) / 2
        prediction = self.prediction.by_token(batch)
        net = self.conditioner.by_token(batch, context)
        for i, j in itertools.product(range(height // r), range(width // r)):
            prediction.start(i, j)
            net.start(i, j)
            values, residuals = x.new_zeros(2, batch, entries)
            for d in range(entries):
                c, (dy, dx) = d // r**2, divmod(d % r**2, r)
                index = (c * height + i * r + dy) * width + j * r + dx
                mean = prediction.mean(d, values)
                edges = self.mixture.cumulative(
                    ((mean + 1) * half)[:, None],
                    log_scale[d : d + 1] + math.log(half),
                    net.parameters(d, mean),
                )
                x[:, index] = level = next_level(edges[:, 0], index)
                values[:, d] = level / half - 1
                residuals[:, d] = (values[:, d] - mean) * (-log_scale[d]).exp()
                net.known(d, values[:, d], residuals[:, d])
            prediction.end(i, j, values)
            net.end(i, j, values, residuals)
        return x.view(batch, *self.shape)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = torch.empty_like(z)
        log_derivatives = torch.empty_like(z)

        def next_level(edges: Tensor, index: int) -> Tensor:
            x, u[:, index], log_derivatives[:, index] = self.mixture.at(edges, z[:, index])
            return x

        with full_precision(z), torch.no_grad():
            x = self.in_order(next_level, len(z), context)
        v = (x + u.view_as(x)) / self.levels - 0.5
        return v, sum_per_example(log_derivatives) - z.shape[1] * math.log(self.levels)

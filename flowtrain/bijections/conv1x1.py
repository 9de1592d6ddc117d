"""Invertible 1x1 convolutions (Glow, section 3.2), which mix the channels of each pixel."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import DataDependentInit, bounded, stacked, unbounded
from flowtrain.bijections.context import Context
from flowtrain.bijections.precision import full_precision


def random_rotation(channels: int) -> Tensor:
    """A rotation drawn from torch's global generator, `(C, C)` float32."""
    rotation: Tensor = torch.linalg.qr(torch.randn(channels, channels))[0]
    return rotation


@torch.no_grad()
def whitening_matrix(x: Tensor) -> Tensor:
    """The matrix `(C, C)` of PCA whitening for the channels of `x` `(B, C, H, W)`.

    It is computed in float64 on the CPU, because Apple's GPUs have no float64. The smallest
    eigenvalues are floored, so a constant or duplicated channel gives a finite scale, and so does a
    direction in which a few pixels happen not to vary. With n pixels of white noise the smallest
    eigenvalue is `(1 - sqrt(C / n))^2` (Marchenko & Pastur 1967), or 0 if n <= C.
    """
    pixels = x.movedim(1, -1).flatten(0, -2).cpu().double()
    covariance = torch.cov(pixels.T, correction=0).reshape(x.shape[1], x.shape[1])
    variance, directions = torch.linalg.eigh(covariance)
    few = min(1.0, x.shape[1] / len(pixels)) ** 2
    variance = variance.clamp_min(
        max(1e-6 * float(variance.max()), few * float(variance.mean()), 1e-12)
    )
    whitening: Tensor = (directions * variance.rsqrt()).T
    return whitening


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`W x + b` at every pixel: `(B, C, H, W)`, `(C, C)`, `(C,)` to `(B, C, H, W)`."""
    # One product per image. `conv2d` is slower at any width. One product over all pixels would need
    # the channels last in memory, so that everything else is up to ten times slower.
    pixels, weights = x.flatten(2), weight.expand(x.shape[0], *weight.shape)
    z = weights @ pixels if bias is None else torch.baddbmm(bias[:, None], weights, pixels)
    return z.view_as(x)


class LinearChannels(DataDependentInit):
    """The part that both parametrizations share: `z = W x` at every pixel.

    W is a random rotation, as in the paper. With `initialization` `whitening`, the first batch sets
    it if it has more than two pixels per channel.
    """

    def __init__(self, initialization: str):
        super().__init__()
        self.initialized.fill_(initialization != "whitening")

    def mixing_matrix(self) -> Tensor:
        """W, `(C, C)`."""
        return self.weights([self])[0]

    @classmethod
    def weights(cls, layers: Sequence[Self]) -> Tensor:
        """W of K layers of one size, `(K, C, C)`, in as few operations as for one layer."""
        raise NotImplementedError

    @classmethod
    def inverse_weights(cls, layers: Sequence[Self]) -> Tensor:
        """W^-1 of K layers of one size, `(K, C, C)`."""
        raise NotImplementedError

    @classmethod
    def log_abs_dets(cls, layers: Sequence[Self]) -> Tensor:
        """log|det W| of K layers of one size, `(K,)`, in nats."""
        raise NotImplementedError

    def set_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def set_from(self, x: Tensor) -> None:
        pixels, channels = x[:, 0].numel(), x.shape[1]
        if pixels > 2 * channels:  # C pixels cannot even vary in C directions
            self.set_weight(whitening_matrix(x))

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_abs_dets([self]) * x[0, 0].numel()).expand(x.shape[0])

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        with full_precision(x):
            return mix_channels(x, self.mixing_matrix()), self._log_det(x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        with full_precision(z):
            return mix_channels(z, self.inverse_weights([self])[0]), -self._log_det(z)


class Conv1x1LU(LinearChannels):
    """`W = P L (U + diag(sign * exp(log_scale)))` (Glow, eq. 10).

    The log-determinant costs C additions. `P` and the signs are fixed buffers. `log_scale` is
    bounded by tanh to +-8, so W cannot become singular.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, initialization: str = "rotation"):
        super().__init__(initialization)
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.zeros(channels, channels))
        self.register_buffer("sign", torch.ones(channels))
        self.set_weight(random_rotation(channels))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        self.permutation.copy_(permutation)
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.sign.copy_(diagonal.sign())
        self.log_scale.copy_(unbounded(diagonal.abs().log(), LOG_SCALE_LIMIT))

    @classmethod
    def _factors(cls, layers: Sequence[Self]) -> tuple[Tensor, Tensor]:
        diagonal = (
            stacked(layers, "sign") * bounded(stacked(layers, "log_scale"), LOG_SCALE_LIMIT).exp()
        )
        identity = torch.eye(diagonal.shape[1], dtype=diagonal.dtype, device=diagonal.device)
        lower = stacked(layers, "lower").tril(-1) + identity
        return lower, stacked(layers, "upper").triu(1) + diagonal.diag_embed()

    @classmethod
    def weights(cls, layers: Sequence[Self]) -> Tensor:
        lower, upper = cls._factors(layers)
        return stacked(layers, "permutation") @ (lower @ upper)

    @classmethod
    def inverse_weights(cls, layers: Sequence[Self]) -> Tensor:
        lower, upper = cls._factors(layers)
        inverse_lower = torch.linalg.solve_triangular(
            lower, stacked(layers, "permutation").mT, upper=False
        )
        inverses: Tensor = torch.linalg.solve_triangular(upper, inverse_lower, upper=True)
        return inverses

    @classmethod
    def log_abs_dets(cls, layers: Sequence[Self]) -> Tensor:
        return bounded(stacked(layers, "log_scale"), LOG_SCALE_LIMIT).sum(dim=1)


class Conv1x1(LinearChannels):
    """The plain parametrization: W itself, its determinant by LU at every call (Glow, eq. 9)."""

    def __init__(self, channels: int, initialization: str = "rotation"):
        super().__init__(initialization)
        self.matrix = nn.Parameter(random_rotation(channels))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.matrix.copy_(weight)

    @classmethod
    def weights(cls, layers: Sequence[Self]) -> Tensor:
        return stacked(layers, "matrix")

    @classmethod
    def inverse_weights(cls, layers: Sequence[Self]) -> Tensor:
        inverse, failed = torch.linalg.inv_ex(stacked(layers, "matrix"))
        # A singular matrix gives NaN, not an exception.
        return torch.where(failed[:, None, None] == 0, inverse, torch.nan)

    @classmethod
    def log_abs_dets(cls, layers: Sequence[Self]) -> Tensor:
        log_abs_dets: Tensor = torch.linalg.slogdet(stacked(layers, "matrix")).logabsdet
        return log_abs_dets

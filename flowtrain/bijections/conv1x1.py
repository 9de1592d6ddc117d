"""Invertible 1x1 convolutions (Glow, section 3.2): a learned mixing of the channels at every pixel."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import Bijection, bounded, unbounded


def random_rotation(channels: int) -> Tensor:
    """A rotation drawn from torch's global generator, `(C, C)` float32."""
    return torch.linalg.qr(torch.randn(channels, channels))[0]


@torch.no_grad()
def whitening_matrix(x: Tensor) -> Tensor:
    """PCA whitening of the channels of `x` `(B, C, H, W)`: decorrelates and scales to unit variance, `(C, C)`.

    Computed in float64 on the CPU. The smallest eigenvalues are floored, so that a constant or a duplicated
    channel gives a large scale and not an infinite one.
    """
    pixels = x.movedim(1, -1).flatten(0, -2).double().cpu()
    covariance = torch.cov(pixels.T).reshape(x.shape[1], x.shape[1])
    variance, directions = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(1e-6 * variance.max().clamp_min(1e-6))
    return (directions * variance.rsqrt()).T


class _LinearChannels(Bijection):
    """What both parametrizations share: `z = W x` at every pixel.

    `initialization` is `rotation` (as in the paper) or `whitening` (set from the first batch).
    """

    initialized: Tensor

    def __init__(self, initialization: str):
        super().__init__()
        self.whitens = initialization == "whitening"
        self.register_buffer("initialized", torch.tensor(not self.whitens))

    def weight(self) -> Tensor:
        raise NotImplementedError

    def inverse_weight(self) -> Tensor:
        raise NotImplementedError

    def log_abs_det(self) -> Tensor:
        raise NotImplementedError

    def set_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        if not self.initialized:
            self.set_weight(whitening_matrix(x))
            self.initialized.fill_(True)

    def _apply_channels(self, x: Tensor, matrix: Tensor) -> Tensor:
        # The data path stays in full precision: under autocast this product costs likelihood.
        with torch.autocast(x.device.type, enabled=False):
            # With channels last in memory this is one matrix product over all pixels, without a copy.
            return nn.functional.linear(x.movedim(1, -1), matrix).movedim(-1, 1)

    def _log_det(self, x: Tensor) -> Tensor:
        pixels = x[0, 0].numel()
        return (self.log_abs_det() * pixels).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight()
        return self._apply_channels(x, weight), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            weight = self.inverse_weight()
        return self._apply_channels(z, weight), -self._log_det(z)


class Conv1x1LU(_LinearChannels):
    """`W = P L (U + diag(sign * exp(log_scale)))` (Glow, eq. 10): the determinant costs C additions.

    `P` and the signs are fixed buffers; `log_scale` is bounded by tanh to +-8, so W cannot become singular.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, initialization: str = "rotation"):
        super().__init__(initialization)
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.eye(channels))
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

    def _factors(self) -> tuple[Tensor, Tensor]:
        diagonal = self.sign * bounded(self.log_scale, LOG_SCALE_LIMIT).exp()
        identity = torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        return self.lower.tril(-1) + identity, self.upper.triu(1) + diagonal.diag()

    def weight(self) -> Tensor:
        lower, upper = self._factors()
        return self.permutation @ (lower @ upper)

    def inverse_weight(self) -> Tensor:
        lower, upper = self._factors()
        inverse_lower = torch.linalg.solve_triangular(lower, self.permutation.T, upper=False)
        return torch.linalg.solve_triangular(upper, inverse_lower, upper=True)

    def log_abs_det(self) -> Tensor:
        return bounded(self.log_scale, LOG_SCALE_LIMIT).sum()


class Conv1x1(_LinearChannels):
    """The plain parametrization: W itself, its determinant by LU at every call (Glow, eq. 9)."""

    def __init__(self, channels: int, initialization: str = "rotation"):
        super().__init__(initialization)
        self.matrix = nn.Parameter(random_rotation(channels))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.matrix.copy_(weight)

    def weight(self) -> Tensor:
        return self.matrix

    def inverse_weight(self) -> Tensor:
        inverse, failed = torch.linalg.inv_ex(self.matrix)
        return torch.where(failed == 0, inverse, torch.nan)  # a singular matrix gives NaN, not an exception

    def log_abs_det(self) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet

"""Scale and shift: per channel, learned or set from the first batch, and of standardized data."""

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import (
    Bijection,
    DataDependentInit,
    bounded,
    sum_per_example,
    unbounded,
)
from flowtrain.bijections.context import Context

# exp(8) is about 3,000. Dequantization noise alone has a standard deviation of 1/887 in y, so even
# a channel that is constant in the data can be scaled to unit variance. Its inverse is harmless.
LOG_SCALE_LIMIT = 8.0


class DiagonalAffine(Bijection):
    """`z = x * exp(s) + shift` with one shift and one `s` (bounded by tanh to +-8) per entry.

    This is NICE's diagonal scaling (Dinh et al. 2015, eq. 11), and Glow's learned top prior
    (Kingma & Dhariwal 2018; `learn_top` in the release). `shape` is the shape of the parameters,
    which are broadcast against one example: for instance `(D,)` or `(C, 1, 1)`.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def bounded_log_scale(self) -> Tensor:
        return bounded(self.log_scale, LOG_SCALE_LIMIT)

    def _log_det(self, log_scale: Tensor, like: Tensor) -> Tensor:
        return sum_per_example(log_scale.expand_as(like[:1])).expand(like.shape[0])

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self.bounded_log_scale()
        return x * log_scale.exp() + self.shift, self._log_det(log_scale, x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self.bounded_log_scale()
        return (z - self.shift) * (-log_scale).exp(), self._log_det(-log_scale, z)


class ActNorm(DataDependentInit, DiagonalAffine):
    """Activation normalization (Glow, section 3.1): a scale and a shift per channel.

    The first batch sets them so that its channels have zero mean and unit variance.
    """

    def set_from(self, x: Tensor) -> None:
        # Statistics over the batch and every dimension in which the parameters are broadcast.
        dims = [0] + [i + 1 for i, n in enumerate(self.log_scale.shape) if n == 1]
        std, mean = torch.std_mean(x, dim=dims, keepdim=True, correction=0)
        std = torch.where(std > 0, std, 1.0)  # a value may be rare in the batch, or alone
        self.log_scale.copy_(unbounded(-std.log(), LOG_SCALE_LIMIT)[0])
        self.shift.copy_(-mean[0] * self.bounded_log_scale().exp())

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        return super().forward(x, context)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        return super().inverse(z, context)


class Standardize(DataDependentInit):
    """`z = (x - mean) / std`, a fixed layer for entries in units of their own.

    The first batch sets it. Unlike an ActNorm it is neither learned nor bounded, and an entry may
    have any unit. `shape` is the shape of an example.
    """

    initialization_images = 1024  # of which the standard deviation is known to about 2%

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def set_from(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.cpu().double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))  # a value may be rare in the batch

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        return (x - self.mean) / self.std, -self.std.log().sum().expand(len(x))

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        self.require_initialized()
        return z * self.std + self.mean, self.std.log().sum().expand(len(z))

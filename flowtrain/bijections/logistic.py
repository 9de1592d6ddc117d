"""A logistic base distribution, as a fixed layer in front of the standard normal base."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, sum_per_example
from flowtrain.bijections.context import Context

LARGEST = 80.0  # sigmoid(-80) is still a normal float32


class LogisticToNormal(Bijection):
    """`z = Phi^-1(sigmoid(x))`, standard normal if `x` is standard logistic.

    See NICE, eq. 14. Both directions are computed on the negative half-axis, where nothing cancels.
    """

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        tail = -x.abs()
        z = torch.where(
            tail < -LARGEST,
            _far_quantile(tail.clamp_max(-LARGEST)),
            torch.special.ndtri(torch.sigmoid(tail.clamp_min(-LARGEST))),
        )
        log_logistic = tail - 2 * torch.nn.functional.softplus(tail)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
        return torch.where(x > 0, -z, z), sum_per_example(log_logistic - log_normal)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        tail = -z.abs()
        x = torch.special.log_ndtr(tail) - torch.special.log_ndtr(-tail)
        log_logistic = x - 2 * torch.nn.functional.softplus(x)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
        return torch.where(z > 0, -x, x), sum_per_example(log_normal - log_logistic)


def _far_quantile(log_share: Tensor) -> Tensor:
    """`z` with `log Phi(z) = log_share`, at most -80, which is `log sigmoid` of itself there."""
    squares = -2 * log_share - math.log(2 * math.pi)
    z = -(squares - squares.log()).sqrt()
    for _ in range(3):  # Newton's method; the derivative of log Phi is -z, up to a part in 150
        z = z + (torch.special.log_ndtr(z) - log_share) / z
    return z

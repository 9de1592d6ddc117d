"""A logistic base distribution, as a fixed layer in front of the standard normal base."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, sum_per_example
from flowtrain.bijections.context import Context

# sigmoid(-80) is still a normal float32. Beyond +-80 the likelihood stays exact, but all x have the
# same z, so the inverse returns +-80.
LARGEST = 80.0


class LogisticToNormal(Bijection):
    """`z = Phi^-1(sigmoid(x))`, standard normal if `x` is standard logistic.

    See NICE, eq. 14. Both directions are computed on the negative half-axis, where nothing cancels.
    """

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        tail = -x.abs()
        z = torch.special.ndtri(torch.sigmoid(tail.clamp_min(-LARGEST)))
        log_logistic = tail - 2 * torch.nn.functional.softplus(tail)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
        return torch.where(x > 0, -z, z), sum_per_example(log_logistic - log_normal)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        tail = -z.abs()
        x = torch.special.log_ndtr(tail) - torch.special.log_ndtr(-tail)
        log_logistic = x - 2 * torch.nn.functional.softplus(x)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
        return torch.where(z > 0, -x, x), sum_per_example(log_normal - log_logistic)

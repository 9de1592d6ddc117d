"""Class-conditional densities: the prior of the coarsest latent depends on the class, all else is shared."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import bounded, sum_per_example


def normal_log_prob(z: Tensor) -> Tensor:
    """`log N(z; 0, I)`, nats, `(B, D)` to `(B,)`."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)


class ClassPrior(nn.Module):
    """Latents given the class: a diagonal Gaussian for each on the coarsest level (the Glow release's `ycond`).

    One mean and log-scale (bounded by tanh to +-8) for each class and channel; the finer levels are N(0, I), and so is
    all before training.

    Args:
        classes: their number, K.
        shape: `(C, ...)` of the coarsest level's latent, the last entries of a latent `(B, D)`.
    """

    def __init__(self, classes: int, shape: tuple[int, ...]):
        super().__init__()
        self.classes = classes
        self.shape = tuple(shape)
        self.mean = nn.Parameter(torch.zeros(classes, shape[0]))
        self.log_scale = nn.Parameter(torch.zeros(classes, shape[0]))

    def _of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(labels), self.shape[0], *[1] * (len(self.shape) - 1))
        log_scale = bounded(self.log_scale, LOG_SCALE_LIMIT)
        return self.mean[labels].reshape(shape), log_scale[labels].reshape(shape)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        size = math.prod(self.shape)
        return z[:, : z.shape[1] - size], z[:, z.shape[1] - size :].reshape(-1, *self.shape)

    def log_prob(self, z: Tensor, labels: Tensor) -> Tensor:
        """`log p(z | class)`, nats: latents `(B, D)` and labels `(B,)` to `(B,)`."""
        fine, coarse = self._split(z)
        mean, log_scale = self._of(labels)
        normal = torch.cat([fine, ((coarse - mean) * (-log_scale).exp()).flatten(1)], dim=1)
        return normal_log_prob(normal) - sum_per_example(log_scale.expand_as(coarse))

    def by_class(self, z: Tensor) -> Tensor:
        """`log p(z | class)` for every class: `(B, D)` to `(B, K)`."""
        every = torch.arange(self.classes, device=z.device)
        return torch.stack([self.log_prob(z, label.expand(len(z))) for label in every], dim=1)

    def from_normal(self, noise: Tensor, labels: Tensor) -> Tensor:
        """A standard normal draw as a draw given the class, `(B, D)`."""
        fine, coarse = self._split(noise)
        mean, log_scale = self._of(labels)
        return torch.cat([fine, (coarse * log_scale.exp() + mean).flatten(1)], dim=1)

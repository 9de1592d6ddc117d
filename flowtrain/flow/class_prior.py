"""Class-conditional densities: only the prior of the coarsest latent depends on the class."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import bounded


def normal_log_prob(z: Tensor) -> Tensor:
    """`log N(z; 0, I)` in nats: `(B, D)` to `(B,)`."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)


class ClassPrior(nn.Module):
    """One diagonal Gaussian per class for the latents of the coarsest level.

    The released code of Glow calls this `ycond`. There is one mean and one log-scale per class and
    entry, and tanh bounds the log-scales to +-8. Glow's release has them per channel instead, of
    which the likelihood makes little use. The finer levels are N(0, I). Before training, so is the
    coarsest.

    Args:
        classes: Number of classes, K.
        shape: Shape of the coarsest level's latent, which is the end of a latent `(B, D)`.
    """

    def __init__(self, classes: int, shape: tuple[int, ...]):
        super().__init__()
        self.classes = classes
        self.size = math.prod(shape)
        self.mean = nn.Parameter(torch.zeros(classes, self.size))
        self.log_scale = nn.Parameter(torch.zeros(classes, self.size))

    def bounded_log_scale(self) -> Tensor:
        return bounded(self.log_scale, LOG_SCALE_LIMIT)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.tensor_split([z.shape[1] - self.size], dim=1)  # type: ignore[return-value]

    def log_prob(self, z: Tensor, labels: Tensor) -> Tensor:
        """`log p(z | class)` in nats: latents `(B, D)` and labels `(B,)` to `(B,)`."""
        fine, coarse = self._split(z)
        log_scale = self.bounded_log_scale()[labels]
        normal = (coarse - self.mean[labels]) * (-log_scale).exp()
        return normal_log_prob(fine) + normal_log_prob(normal) - log_scale.sum(dim=1)

    def by_class(self, z: Tensor) -> Tensor:
        """`log p(z | class)` in nats for every class: `(B, D)` to `(B, K)`."""
        fine, coarse = self._split(z)
        log_scale = self.bounded_log_scale()
        classes = [
            normal_log_prob((coarse - mean) * (-scale).exp()) - scale.sum()
            for mean, scale in zip(self.mean, log_scale, strict=True)
        ]
        return normal_log_prob(fine)[:, None] + torch.stack(classes, dim=1)

    def from_normal(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Standard normal draws `(B, D)` as draws given the classes `labels` `(B,)`."""
        fine, coarse = self._split(noise)
        return torch.cat(
            [fine, coarse * self.bounded_log_scale()[labels].exp() + self.mean[labels]], dim=1
        )

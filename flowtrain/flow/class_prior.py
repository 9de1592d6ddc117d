"""The part of a class-conditional model that depends on the class: the prior of latents
(`ClassPrior`), or the networks of the bijection (`ClassContext`).

Both have `latents_of_classes`, `log_prob_by_entry`, the `context` of the bijection, and `unguided`:
the reason why samples cannot be guided, or None.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import bounded


def normal_log_density(z: Tensor) -> Tensor:
    """`log N(z; 0, 1)` in nats, entry by entry."""
    return -0.5 * (z.square() + math.log(2 * math.pi))


def normal_log_prob(z: Tensor) -> Tensor:
    """`log N(z; 0, I)` in nats: `(B, D)` to `(B,)`."""
    # The factor after the sum keeps one tensor fewer, at the peak of a step.
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)


class LogProb(NamedTuple):
    """The parts of a single-draw bound on log P(x), each `(B,)` in nats; their sum is the bound."""

    # log N(z; 0, I). A class-conditional model has the density of the class instead, or the mean
    # over all classes.
    base: Tensor
    log_det: Tensor  # every log-determinant, with -log q(u|x) - D log Q
    # log-density of the base given each class, (B, K), for a class-conditional model without labels
    by_class: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return self.base + self.log_det


def _of_all_classes(by_class: Tensor, log_det: Tensor) -> LogProb:
    """log P(x) from log P(x | class), `(B, K)`, for equally likely classes."""
    mean = by_class.logsumexp(dim=1) - math.log(by_class.shape[1])
    return LogProb(mean, log_det, by_class)


def over_classes(each: Sequence[LogProb]) -> LogProb:
    """log P(x) from log P(x | class) of every class, where all classes are equally likely.

    The log-determinants are the mean over the classes, and the rest of each is in `by_class`.
    """
    log_dets = torch.stack([parts.log_det for parts in each], dim=1)
    mean = log_dets.mean(dim=1)
    bases = torch.stack([parts.base for parts in each], dim=1)
    return _of_all_classes(bases + log_dets - mean[:, None], mean)


class ClassPrior(nn.Module):
    """One diagonal Gaussian per class for the latents of the coarsest level, or of all levels.

    The released code of Glow calls this `ycond`, and has one mean and one log-scale per class and
    channel, here per class and entry. Tanh bounds the log-scales to +-8. Other levels are
    N(0, I). Before training, so is the coarsest.

    Args:
        classes: Number of classes, K.
        shape: Shape of the coarsest level's latent, which is the end of a latent `(B, D)`. For all
            levels it is `(D,)`.
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

    unguided: str | None = (
        "each class has its own prior, and the networks of this model do not see the class"
    )

    def context(self, labels: Tensor | None, count: int) -> None:
        return None

    def with_base(self, z: Tensor, log_det: Tensor, labels: Tensor | None) -> LogProb:
        """The parts of the bound for latents `(B, D)`. See `Flow.forward`."""
        if labels is None:
            return _of_all_classes(self.by_class(z), log_det)
        return LogProb(self.log_prob(z, labels), log_det)

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

    def log_prob_by_entry(self, z: Tensor, labels: Tensor) -> Tensor:
        """The terms of `log_prob` by entry: latents and result are `(B, D)`."""
        fine, coarse = self._split(z)
        log_scale = self.bounded_log_scale()[labels]
        normal = (coarse - self.mean[labels]) * (-log_scale).exp()
        scales = torch.cat([torch.zeros_like(fine), log_scale], dim=1)
        return normal_log_density(torch.cat([fine, normal], dim=1)) - scales

    def carried(self, z: Tensor, first: int, second: int, kept: float = 1.0) -> Tensor:
        """Latents `(B, D)` of a class, whose coarsest level is carried to the Gaussian of another:
        the deviation from the mean, in standard deviations, is `kept` times as large there.
        """
        fine, coarse = self._split(z)
        mean, scale = self.mean, self.bounded_log_scale()
        beyond = (coarse - mean[first]) * (scale[second] - scale[first]).exp()
        return torch.cat([fine, mean[second] + kept * beyond], dim=1)

    def latents_of_classes(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Standard normal draws `(B, D)` as draws given the classes `labels` `(B,)`."""
        fine, coarse = self._split(noise)
        return torch.cat(
            [fine, coarse * self.bounded_log_scale()[labels].exp() + self.mean[labels]], dim=1
        )


class ClassContext(nn.Module):
    """The class as a context of the bijection, whose networks see it. The base is N(0, I).

    In training, each image loses its label with the probability `label_dropout`. Its networks then
    see zeros, and learn the images of all classes together, for guidance (Ho & Salimans 2022,
    arXiv:2207.12598). The label K, after the last class, stands for no class.

    Args:
        classes: Number of classes, K.
        label_dropout: Probability with which training drops a label.
    """

    def __init__(self, classes: int, label_dropout: float = 0.0):
        super().__init__()
        self.classes = classes
        self.label_dropout = label_dropout

    def context(self, labels: Tensor | None, count: int) -> Tensor | None:
        """The context `(B, K)` for B = `count` examples with labels `(B,)`: unit vectors, or zeros
        without a class. None without labels for a model that was trained with all labels.
        """
        if labels is None:
            return torch.zeros(count, self.classes) if self.label_dropout else None
        return F.one_hot(labels, self.classes + 1)[:, : self.classes]

    @property
    def unguided(self) -> str | None:
        if self.label_dropout:
            return None
        return (
            "it was trained with all labels, not on images without a class: train it with "
            "model.label_dropout, for example 0.1"
        )

    def log_prob_by_entry(self, z: Tensor, labels: Tensor) -> Tensor:
        """`log N(z; 0, I)` of each entry: latents and result are `(B, D)`."""
        return normal_log_density(z)

    def latents_of_classes(self, noise: Tensor, labels: Tensor) -> Tensor:
        return noise

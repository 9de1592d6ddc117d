"""The model: dequantization, a bijection and a standard normal base, with an exact likelihood
bound.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.execution import FUSED, Executor, Initializing
from flowtrain.flow.class_prior import ClassPrior, normal_log_prob
from flowtrain.flow.dequantize import Dequantizer, RealValued, draw_noise
from flowtrain.flow.kinds import Kind, bits_per_dim, kind_of


class LogProb(NamedTuple):
    """The parts of a single-draw bound on log P(x), each `(B,)` in nats; their sum is the bound."""

    # log N(z; 0, I); of a class-conditional model the class's density, or the mean of all classes'
    base: Tensor
    log_det: Tensor  # every log-determinant, with -log q(u|x) - D log Q
    # the base's log-density given each class, (B, K), where no class was given
    by_class: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return self.base + self.log_det


class Flow(nn.Module):
    """A normalizing flow on images.

    `log P(x) >= E_u[log N(z; 0, I) + log|det| - log q(u|x)] - D log Q` (Theis et al. 2016; Ho et
    al. 2019), with D the number of entries of the image as stored and Q its number of levels. Of
    real-valued data it is the likelihood itself, `log p(x) = log N(z; 0, I) + log|det|`, a density.

    Args:
        bijection: data to latent, from `(B, C, H, W)` to `(B, D)`.
        dequantizer: integers to reals, or `RealValued` data as they are.
        shape: of one image, `(C, H, W)`.
        class_prior: of the latents, for a class-conditional model.
    """

    def __init__(
        self,
        bijection: Bijection,
        dequantizer: Dequantizer | RealValued,
        shape: tuple[int, int, int],
        class_prior: ClassPrior | None = None,
    ):
        super().__init__()
        self.dequantizer = dequantizer  # first: parameters are in the order in which they are used
        self.bijection = bijection
        self.class_prior = class_prior
        self.shape = shape

    @property
    def levels(self) -> int | None:
        """Q: images have values 0..Q-1. None for real-valued data."""
        return self.dequantizer.levels

    @property
    def kind(self) -> Kind:
        """The kind of data: images, points, or points on a surface."""
        return kind_of(self.levels, self.latent_dims < self.dims)

    def loss(self, log_prob: Tensor) -> Tensor:
        """The loss in `kind.unit`, from nats: bits per dimension of images, nats of points."""
        return self.kind.loss(log_prob, self.dims)

    @property
    def dims(self) -> int:
        """D, the number of entries of an image."""
        return math.prod(self.shape)

    @property
    def latent_dims(self) -> int:
        """The number of entries of a latent: D, but for data on a surface, which has fewer
        dimensions.
        """
        return self.bijection.latent_dims(self.dims)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def classes(self) -> int:
        """Of a class-conditional model their number; else 0."""
        return 0 if self.class_prior is None else self.class_prior.classes

    def to_latents(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        """Latents `(B, D)` of integers `x` `(B, C, H, W)` with uniform noise of that shape, and all
        terms of the bound but the base's density, `(B,)` in nats. `executor` calls the layers.
        """
        v, log_det = self.dequantizer(x, noise.to(self.dtype), executor)
        z, flow_log_det = self.bijection.through(executor, "forward", v)
        return z, log_det + flow_log_det

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        executor: Executor = FUSED,
    ) -> LogProb:
        """The single-draw bound for integers `x` `(B, C, H, W)`, given uniform noise of that shape,
        in its parts.

        Of a class-conditional model log P(x | class), given `labels` `(B,)`, or log P(x), all
        classes being as likely.
        """
        z, log_det = self.to_latents(x, noise, executor)
        if self.class_prior is None:
            return LogProb(normal_log_prob(z), log_det)
        if labels is not None:
            return LogProb(self.class_prior.log_prob(z, labels), log_det)
        by_class = self.class_prior.by_class(z)
        return LogProb(by_class.logsumexp(dim=1) - math.log(self.classes), log_det, by_class)

    def log_prob(
        self, x: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Single-draw bound on log P(x), nats, `(B,)`.

        Args:
            x: integers in 0..Q-1, or reals of real-valued data, `(B, C, H, W)`; unchanged.
            generator: for the dequantization noise; a CPU one gives an image the same noise in a
                batch of any size.
            labels: `(B,)`, for log P(x | class) of a class-conditional model; without, it is log
                P(x).

        Raises:
            ValueError: for another shape, another kind of numbers, a value outside 0..Q-1, or
                labels it does not have.
        """
        x = self._checked(x)
        if labels is not None:
            labels = self._checked_labels(labels, len(x))
        parts: LogProb = self(x, draw_noise(x.shape, generator, x.device), labels)
        return parts.total

    def bits_per_dim(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Single-draw bound in bits per dimension, `(B,)`: `-log P(x) / (D log 2)`. Arguments as
        `log_prob`.

        Raises `ValueError` for real-valued data, whose density has no bits.
        """
        if self.kind.exact:
            raise ValueError(
                "real-valued data have a density, which has no bits per dimension: use log_prob"
            )
        return bits_per_dim(self.log_prob(x, generator), self.dims)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The latent at the middle of each image's bin, `(B, D)`: no randomness, so that `decode`
        gives `x` back.
        """
        z: Tensor = self.bijection(self.dequantizer.middle(self._checked(x), self.dtype))[0]
        return z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents `(B, D)` to images, uint8 `(B, C, H, W)`, or to reals. Raises
        `FloatingPointError` if not finite.
        """
        return self.dequantizer.to_data(self.bijection.inverse(z.to(self.device))[0]).contiguous()

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """`n` images from the model, uint8 `(n, C, H, W)`; the base's standard deviation is
        `temperature`.

        Of a class-conditional model those of the classes `labels` `(n,)`, or of all of them by
        turns.
        """
        return self.decode(self.place(temperature * self.draw_latents(n, generator), labels))

    def place(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Standard normal draws `(B, D)` as latents: of a class-conditional model those of the
        `labels`, or by turns.

        Raises `ValueError` for labels of a model without classes, or outside 0..K-1.
        """
        if labels is None:
            if self.class_prior is None:
                return noise
            labels = torch.arange(len(noise)) % self.classes
        labels = self._checked_labels(labels, len(noise))
        assert self.class_prior is not None
        return self.class_prior.from_normal(noise.to(self.device), labels)

    def _checked_labels(self, labels: Tensor, count: int) -> Tensor:
        if self.class_prior is None:
            raise ValueError("the model is not class-conditional: it has no labels")
        if labels.shape != (count,):
            raise ValueError(f"expected {count} labels, got {tuple(labels.shape)}")
        if count and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
            raise ValueError(
                f"expected classes in 0..{self.classes - 1}, got {sorted(set(labels.tolist()))}"
            )
        return labels.to(self.device)

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` standard normal latents, `(n, D)`, row by row: the first ones do not depend on how
        many follow.
        """
        where = self.device if generator is None else generator.device
        rows = [torch.randn(self.latent_dims, generator=generator, device=where) for _ in range(n)]
        return torch.stack(rows).to(self.device, self.dtype)

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """`(B, D)` to the latents of each level, finest first, each `(B, C, H, W)`."""
        return self.bijection.split_latents(z)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape or x.ndim != 4:
            raise ValueError(
                f"expected images of shape (B, {', '.join(map(str, self.shape))}), got "
                f"{tuple(x.shape)}"
            )
        self.dequantizer.check(x)
        return x.to(self.device)


@torch.no_grad()
def initialize(flow: Flow, x: Tensor, noise: Tensor) -> None:
    """Data-dependent initialization: one pass in which each layer sets itself from its input.

    Layers that are initialized already leave themselves alone.
    """
    flow(x, noise, executor=Initializing())

"""The kind of data that a flow models: images with Q levels, the same with Gaussian noise, points,
or points on a surface.

`kind_of` chooses the kind, and whatever depends on the kind is a member of it.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UserError


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Nats of an image to bits per dimension: `-log P / (D log 2)`."""
    return log_prob / (-dims * math.log(2))


def log_mean_exp(draws: Tensor) -> Tensor:
    """The importance-weighted bound `log 1/K sum_k exp(draw_k)`: `(K, ...)` to `(...)`."""
    return draws.logsumexp(dim=0) - math.log(len(draws))


class QuantizedImages:
    """Images of integers 0..Q-1. Their probability has a bound, in bits per dimension."""

    unit = "bits/dim"  # unit of the loss, for messages
    no_bits: str | None = None  # the reason why a likelihood has no bits per dimension
    bound = "a bound"  # the word for a likelihood that is not exact
    exact = False  # whether there is no dequantization noise, so that the likelihood is exact
    on_surface = False  # whether a latent has fewer entries than an example
    picture_count = 64  # samples in a picture
    report_count = 16  # samples in each picture of a report
    report_temperatures = (0.5, 0.7, 0.85, 1.0)  # a report has one picture for each

    def __init__(self, num_bins: int):
        self.num_bins = num_bins
        self.scale = num_bins  # factor of the reconstruction error
        self.words = f"{num_bins} levels"  # what the values are, for messages

    def npz(self) -> dict[str, Any]:
        """Further arrays of an .npz file of samples."""
        return {"levels": self.num_bins}

    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        """The loss in `unit`, from nats of examples with `dims` entries."""
        return bits_per_dim(log_prob, dims)

    def over_draws(self, draws: Tensor) -> Tensor:
        """The result of several draws of the noise, in nats: `(K, ...)` to `(...)`."""
        return log_mean_exp(draws)

    def in_unit(self, bits: np.ndarray) -> np.ndarray:
        """Bits per dimension in `unit`."""
        return bits

    @property
    def uniform_loss(self) -> float:
        """The loss of a model for which all images are equally likely, in `unit`."""
        return math.log2(self.num_bins)

    def require_bins(self, message: str) -> int:
        """Q. For real values, raises `UserError` with the message."""
        return self.num_bins

    def fault(self, values: np.ndarray) -> str | None:
        """The fault of stored values, for messages, or None."""
        if self.num_bins < 256 and int(values.max()) >= self.num_bins:
            return f"a value of {int(values.max())}, expected 0..{self.num_bins - 1}"
        if values.dtype != np.uint8:
            return f"values of type {values.dtype}, expected uint8"
        return None

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        """Random examples `(B, C, H, W)`, to stand for data that are not read."""
        return torch.randint(self.num_bins, shape, generator=randomness, dtype=torch.uint8)

    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        """As many examples as `x`, uniform over all possible values."""
        return self.random(x.shape, randomness)

    def levels_per_unit(self, x: Tensor) -> float:
        """Q, the number of levels per unit of `Dequantizer.to_unit`."""
        return self.num_bins


class NoisyImages(QuantizedImages):
    """Images of integers 0..Q-1 with Gaussian noise: the model is a density of noisy images in
    [0, 1], in nats per dimension. It bounds no probability, so nothing about it is in bits.

    Args:
        num_bins: Q.
        sigma: Standard deviation of the noise, where 0 is black and 1 is white.
    """

    unit = "nats/dim"
    no_bits = (
        "a model trained with Gaussian noise (dequantization.name: gaussian) is a density of noisy "
        "images, which has no bits per dimension"
    )
    bound = "a density of noisy images"

    def __init__(self, num_bins: int, sigma: float):
        super().__init__(num_bins)
        self.sigma = sigma

    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        return log_prob / -dims

    def over_draws(self, draws: Tensor) -> Tensor:
        """The mean log-density of several noisy images of an image."""
        return draws.mean(dim=0)

    def in_unit(self, bits: np.ndarray) -> np.ndarray:
        return bits * math.log(2)

    @property
    def uniform_loss(self) -> float:
        return 0.0


class Points:
    """Real values. They have a density, which is computed exactly, in nats."""

    num_bins = None
    words = "real values"
    unit = "nats"
    no_bits = "real-valued data have a density, which has no bits per dimension"
    bound = "exact"
    exact = True
    on_surface = False
    scale = 1
    picture_count = report_count = 2000
    report_temperatures = (1.0,)  # each picture shows much else

    def npz(self) -> dict[str, Any]:
        return {}

    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        return -log_prob

    def over_draws(self, draws: Tensor) -> Tensor:
        return log_mean_exp(draws)

    def require_bins(self, message: str) -> int:
        raise UserError(message)

    def fault(self, values: np.ndarray) -> str | None:
        return None if np.isfinite(values).all() else "a value that is not finite"

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=randomness)

    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        """As many examples as `x`, uniform over the range of each entry, which has its own unit."""
        low, high = x.aminmax(dim=0)
        return low + (high - low) * torch.rand(x.shape, generator=randomness)

    def levels_per_unit(self, x: Tensor) -> float:
        """256 over the range of `x`, so that a level is a 256th of it."""
        return 256 / float((x.max() - x.min()).clamp_min(1e-6))


class SurfacePoints(Points):
    """Points on a surface, so far the unit sphere, with a density with respect to the area."""

    on_surface = True

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        x = super().random(shape, randomness)
        return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))

    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        return self.random(tuple(x.shape), randomness)


Kind = QuantizedImages | Points


def kind_of(num_bins: int | None, on_surface: bool = False, sigma: float | None = None) -> Kind:
    """The kind of data with values 0..num_bins-1, perhaps with Gaussian noise of the standard
    deviation `sigma`, or with real values if `num_bins` is None.
    """
    if num_bins is not None:
        return QuantizedImages(num_bins) if sigma is None else NoisyImages(num_bins, sigma)
    return SurfacePoints() if on_surface else Points()

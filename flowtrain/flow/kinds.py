"""The kind of data that a flow models: images with Q levels, points, or points on a surface.

`kind_of` chooses the kind. Whatever depends on it is a question that the kind answers, so other
code does not ask whether there are levels.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UserError


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Nats of an image to bits per dimension: `-log P / (D log 2)`."""
    return log_prob / (-dims * math.log(2))


class Kind(ABC):
    """The questions that each kind of data answers."""

    levels: int | None  # Q: the values are 0..Q-1. None for real values
    words: str  # what the values are, for messages
    unit: str  # unit of the loss, for messages
    metric: str  # name of the loss in files
    exact: bool  # whether the likelihood is exact, because there is no dequantization noise
    on_surface = False  # whether a latent has fewer entries than an example
    scale: int  # what the reconstruction error is multiplied by

    picture_count: int  # samples in a picture
    report_count: int  # samples in each picture of a report
    report_temperatures: tuple[float, ...]  # a report has one picture for each
    decode_batch: int  # samples decoded at a time

    @abstractmethod
    def npz(self) -> dict[str, int]:
        """What an .npz file of samples says beside the samples."""

    @abstractmethod
    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        """The loss in `unit`, from nats of examples with `dims` entries."""

    @abstractmethod
    def require_levels(self, message: str) -> int:
        """Q. Raises `UserError` with the message for real values."""

    @abstractmethod
    def reduced(self, drop_bits: int) -> "Kind":
        """The kind of the same data without their lowest bits."""

    @abstractmethod
    def fault(self, values: np.ndarray) -> str | None:
        """What is wrong with stored values, in words, or None."""

    @abstractmethod
    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        """Random examples `(B, C, H, W)`, to stand for data that are not read."""

    @abstractmethod
    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        """As many examples as `x`, uniform over all possible values or over the range of `x`."""

    @abstractmethod
    def levels_per_unit(self, x: Tensor) -> float:
        """Q; for real values 256 over the range of `x`, so that a level is a 256th of it."""


class QuantizedImages(Kind):
    """Images of integers 0..Q-1. Their probability has a bound, in bits per dimension."""

    levels: int
    unit = "bits/dim"
    metric = "bits_per_dim"
    exact = False
    picture_count = 64
    report_count = 16
    report_temperatures = (0.5, 0.7, 0.85, 1.0)
    decode_batch = 64

    def __init__(self, levels: int):
        self.levels = self.scale = levels
        self.words = f"{levels} levels"

    def npz(self) -> dict[str, int]:
        return {"levels": self.levels}

    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        return bits_per_dim(log_prob, dims)

    def require_levels(self, message: str) -> int:
        return self.levels

    def reduced(self, drop_bits: int) -> Kind:
        return QuantizedImages(self.levels >> drop_bits)

    def fault(self, values: np.ndarray) -> str | None:
        if self.levels < 256 and int(values.max()) >= self.levels:
            return f"a value of {int(values.max())}, expected 0..{self.levels - 1}"
        return None

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        return torch.randint(self.levels, shape, generator=randomness, dtype=torch.uint8)

    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        return self.random(x.shape, randomness)

    def levels_per_unit(self, x: Tensor) -> float:
        return self.levels


class Points(Kind):
    """Real values. They have a density, which is computed exactly, in nats."""

    levels = None
    words = "real values"
    unit = metric = "nats"
    exact = True
    scale = 1
    picture_count = report_count = 2000
    report_temperatures = (1.0,)  # each picture shows much else
    decode_batch = 640

    def npz(self) -> dict[str, int]:
        return {}

    def loss(self, log_prob: Tensor, dims: int) -> Tensor:
        return -log_prob

    def require_levels(self, message: str) -> int:
        raise UserError(message)

    def reduced(self, drop_bits: int) -> Kind:
        return self

    def fault(self, values: np.ndarray) -> str | None:
        return None if np.isfinite(values).all() else "a value that is not finite"

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=randomness)

    def uniform_like(self, x: Tensor, randomness: torch.Generator) -> Tensor:
        return x.min() + (x.max() - x.min()) * torch.rand(x.shape, generator=randomness)

    def levels_per_unit(self, x: Tensor) -> float:
        return 256 / float((x.max() - x.min()).clamp_min(1e-6))


class SurfacePoints(Points):
    """Points on a surface in space, with a density with respect to the area.

    The unit sphere is the only such surface so far.
    """

    on_surface = True

    def random(self, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
        x = super().random(shape, randomness)
        return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


def kind_of(levels: int | None, on_surface: bool = False) -> Kind:
    """The kind of data with values 0..levels-1, or with real values where `levels` is None."""
    if levels is not None:
        return QuantizedImages(levels)
    return SurfacePoints() if on_surface else Points()

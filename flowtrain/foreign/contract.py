"""The contract of a flow that flowtrain has not built."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.types import Shape


@dataclass(frozen=True)
class Foreign:
    """A flow of another library, and how integers become its input:

        v = offset + scale (x + u),  or  v = logit(alpha + (1 - 2 alpha) (x + u) / Q)

    where u is uniform noise on [0, 1) that flowtrain draws. The log-determinant of this map is
    flowtrain's too.

    Attributes:
        flow: A flow of normflows, nflows, zuko or FrEIA, a `TransformedDistribution`, or an object
            with `forward(v) -> z, log_det` and `inverse(z) -> v, log_det` and the base N(0, I), or
            with `log_prob(v)` and `sample(n)`. `log_det` and `log_prob` are in nats, `(B,)`.
        shape: The shape of one example, `(C, H, W)` for images or `(D,)`.
        num_bins: Q. Images have the values 0..Q-1. None for real values, which are not changed.
        scale: 1/Q by default.
        offset: Such as -0.5 to centre.
        alpha: For the logit, which has neither `scale` nor `offset`.
        flat: The flow takes an image as a vector `(D,)`.
        adds_noise: The flow draws the noise itself, or needs none. It takes `v = offset + scale x`,
            its log-det or log-density has all terms of the bound on log P(x), and its inverse gives
            a value in the bin of x.
        bits_per_dim: The project's own figure for integers x, uint8 `(B, C, H, W)`: a number or
            `(B,)`. Or the number that it prints for its test images. `flowtrain doctor` compares it
            with its own.

    Raises:
        UserError: The values do not fit together.
    """

    flow: Any
    shape: tuple[int, ...]
    num_bins: int | None = None
    scale: float | None = None
    offset: float = 0.0
    alpha: float | None = None
    flat: bool = False
    adds_noise: bool = False
    bits_per_dim: Callable[[Tensor], Any] | float | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, Iterable) else ()
        sides = [each for each in shape if isinstance(each, Integral) and each >= 1]
        if len(shape) not in (1, 3) or len(sides) < len(shape):
            raise UserError(f"shape: {self.shape}, expected (C, H, W) or (D,)")
        bins = 256 if self.num_bins is None else self.num_bins
        if not isinstance(bins, Integral) or not 2 <= bins <= 256:
            raise UserError(f"num_bins: {self.num_bins}, expected 2..256, or None for real values")
        mapped = self.scale is not None or self.offset != 0
        of_images = mapped or self.alpha is not None or self.adds_noise
        if self.num_bins is None and (of_images or self.bits_per_dim is not None):
            raise UserError(
                "scale, offset, alpha, adds_noise and bits_per_dim are for images: give num_bins"
            )
        if self.alpha is not None and (mapped or self.adds_noise or not 0 < self.alpha < 0.5):
            raise UserError(
                f"alpha: {self.alpha}, expected 0..1/2, without scale, offset and adds_noise"
            )
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(f"scale: {self.scale}, expected a positive number")
        if not math.isfinite(self.offset):
            raise UserError(f"offset: {self.offset}, expected a finite number")

    @property
    def image_shape(self) -> Shape:
        """`shape` as `(C, H, W)`: flowtrain stores vectors as `(D, 1, 1)`."""
        channels, height, width = (*self.shape, 1, 1)[:3]
        return channels, height, width

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example for the flow."""
        return (math.prod(self.shape),) if self.flat else self.shape

    @property
    def prints_bits(self) -> bool:
        """Whether the project's own figure is a number."""
        return self.bits_per_dim is not None and not callable(self.bits_per_dim)

    @property
    def words(self) -> str:
        """How integers become the flow's input, for messages."""
        if self.num_bins is None:
            return "real values"
        if self.alpha is not None:
            return f"logit({self.alpha:g} + {1 - 2 * self.alpha:g} (x + u) / {self.num_bins})"
        x = "x" if self.adds_noise else "(x + u)"
        scaled = f"{x} / {self.num_bins}" if self.scale is None else f"{self.scale:g} {x}"
        sign = "-" if self.offset < 0 else "+"
        return f"{scaled} {sign} {abs(self.offset):g}" if self.offset else scaled

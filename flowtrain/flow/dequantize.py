"""Data to reals and back.

An image `x` in {0..Q-1} becomes `y = (x + u) / Q` in [0, 1). The noise `u` has a density q(u|x),
uniform or learned (`variational.py`). Centring (`y - 1/2`) or the logit makes `y` the input of the
flow. `to_data` is the exact inverse, except with Gaussian noise, which may leave the level. No
other module computes with the logit's alpha or its log-determinant.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Executor, sum_per_example
from flowtrain.bijections.execution import FUSED

# u is kept this far from the edges of its bin. In float32, 255 + (1 - 2**-24) is 256, and x / 17 *
# 17 can fall below x. For Q up to 256, 2**-14 is more than twice the largest rounding error of
# (x + u) / Q * Q. It changes only one draw in 8,192, by less than 2**-14 of a level.
EDGE = 2.0**-14
# Uniform numbers in float32 are multiples of 2**-24. They may be 0, whose normal quantile is
# -infinity.
SMALLEST, LARGEST = 2.0**-25, 1 - 2.0**-24


def draw_noise(
    shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Uniform numbers in [0, 1) for `Dequantizer.forward`, float32, from the generator's device.

    With a CPU generator, an image's noise depends neither on the model's device nor on batch size.
    """
    where = device if generator is None else generator.device
    noise = torch.rand(shape, generator=generator, dtype=torch.float32, device=where)
    return noise.to(device)


def _require_finite(v: Tensor) -> None:
    if torch.compiler.is_exporting():  # a graph raises nothing
        return
    if not torch.isfinite(v).all():
        bad = (~torch.isfinite(v.flatten(1))).any(dim=1).sum()
        raise FloatingPointError(f"{bad} of {len(v)} decoded images are not finite")


class UniformNoise(nn.Module):
    """Uniform dequantization (Uria et al. 2013; Theis et al. 2016), where log q(u|x) = 0.

    As in all noise models, `forward` maps uniform `noise` in [0, 1) and the scaled image, both
    `(B, C, H, W)`, to `u` in `[EDGE, 1 - EDGE]` and `log q(u|x)`, `(B,)` in nats. `inverse` maps
    `u` and the image to the noise and `log q(u|x)`.
    """

    def forward(
        self, noise: Tensor, x: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        return noise.clamp(EDGE, 1 - EDGE), noise.new_zeros(noise.shape[0])

    def inverse(self, u: Tensor, x: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        return u, u.new_zeros(u.shape[0])


class Dequantizer(nn.Module):
    """Adds noise `u ~ q(u|x)` (Theis et al. 2016; Ho et al. 2019), then centres or takes the logit.

    Args:
        num_bins: Number of levels, Q.
        transform: `center` is `y - 1/2`. `logit` is `logit(alpha + (1 - 2 alpha) y)`, as in
            RealNVP, section 4.1, but with both ends kept away from infinity.
        alpha: Parameter of `logit`.
        noise_model: Maps uniform noise and the image to `u` and `log q(u|x)`, and back. By default
            it is `UniformNoise`.
    """

    sigma: float | None = None  # standard deviation of Gaussian noise, if that is the noise

    def __init__(
        self,
        num_bins: int,
        transform: Literal["center", "logit"] = "center",
        alpha: float = 0.05,
        noise_model: nn.Module | None = None,
    ):
        super().__init__()
        self.num_bins = num_bins
        self.transform = transform
        self.alpha = alpha
        self.noise_model = UniformNoise() if noise_model is None else noise_model

    @property
    def learns_noise(self) -> bool:
        """Whether the noise depends on the image, through weights of its own."""
        return not isinstance(self.noise_model, UniformNoise)

    @property
    def of_entry(self) -> float:
        """The term of `forward` that each entry of an image has: `-log Q`, in nats."""
        return -math.log(self.num_bins)

    def check(self, x: Tensor) -> None:
        """Raises `ValueError` unless `x` has integers in 0..Q-1."""
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"expected integers in 0..{self.num_bins - 1}, got {x.dtype}")
        low, high = map(int, x.long().aminmax())  # torch has no extremes of uint16
        if low < 0 or high >= self.num_bins:
            raise ValueError(f"expected values in 0..{self.num_bins - 1}, got {low}..{high}")

    def forward(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        """Integers and uniform noise, both `(B, C, H, W)`, to the flow's input and the other terms
        of the bound on log P(x): `log|det| - log q(u|x) - D log Q`, `(B,)` in nats.
        """
        u, log_q = self.draw(x, noise, executor)
        v, log_det = self.from_unit((x.to(noise.dtype) + u) / self.num_bins)
        return v, log_det - log_q

    def forward_by_place(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The flow's input, and the terms of `forward` except for `of_entry`: for each place,
        `(B, H, W)`, and `-log q(u|x)` of the whole image, `(B,)`.
        """
        u, log_q = self.draw(x, noise)
        y = (x.to(noise.dtype) + u) / self.num_bins
        v, log_terms = self.from_unit(y.reshape(-1, 1))  # each entry as an example
        return v.view_as(y), (log_terms.view_as(y) - self.of_entry).sum(dim=1), -log_q

    def draw(self, x: Tensor, noise: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        """Uniform noise to `u ~ q(u|x)` for integers `x`, and `log q(u|x)`, `(B,)` in nats."""
        drawn: tuple[Tensor, Tensor] = self.noise_model(noise, self._scaled(x, noise), executor)
        return drawn

    def noise_of(self, x: Tensor, u: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        """The inverse of `draw`: the noise that becomes `u`, and the same `log q(u|x)`."""
        noise: tuple[Tensor, Tensor]
        noise = self.noise_model.inverse(u, self._scaled(x, u), executor)  # type: ignore[operator]
        return noise

    def _scaled(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype) / self.num_bins - 0.5

    def middle(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The flow's input for `x` at the middle of each bin, without noise."""
        return self.from_unit((x.to(dtype) + 0.5) / self.num_bins)[0]

    def to_unit(self, v: Tensor) -> Tensor:
        """The flow's input back to `y`, which is nominally in [0, 1)."""
        if self.transform == "center":
            return v + 0.5
        return (torch.sigmoid(v) - self.alpha) / (1 - 2 * self.alpha)

    def to_data(self, v: Tensor) -> Tensor:
        """The flow's input back to uint8 in 0..Q-1. Raises `FloatingPointError` for inf or NaN."""
        _require_finite(v)
        return (self.to_unit(v) * self.num_bins).floor().clamp(0, self.num_bins - 1).to(torch.uint8)

    def from_unit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `to_unit`, and its log-determinant with `-D log Q`, `(B,)` in nats."""
        dims = y[0].numel()
        constant = -dims * math.log(self.num_bins)
        if self.transform == "center":
            return y - 0.5, y.new_full((y.shape[0],), constant)
        s = self.alpha + (1 - 2 * self.alpha) * y
        log_s, log_rest = s.log(), torch.log1p(-s)
        log_det = sum_per_example(-log_s - log_rest) + dims * math.log(1 - 2 * self.alpha)
        return log_s - log_rest, log_det + constant


class GaussianDequantizer(Dequantizer):
    """Adds Gaussian noise to an image in [0, 1], then centres (TarFlow, Zhai et al. 2024,
    arXiv:2412.06329, section 3.3; there, images in [-1, 1] have twice the noise).

        y = (x + 1/2) / Q + sigma eps,  eps ~ N(0, I)

    The flow is then a density of noisy images, and so are samples. The noise may leave the level,
    so this density is no bound on the probability of the image.

    Args:
        num_bins: Number of levels, Q.
        sigma: Standard deviation of the noise, where 0 is black and 1 is white.
    """

    sigma: float
    of_entry = 0.0

    def __init__(self, num_bins: int, sigma: float):
        super().__init__(num_bins)
        self.sigma = sigma

    def forward(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        """As `Dequantizer.forward`, but with zeros: the density is with respect to `y`."""
        eps = torch.special.ndtri(noise.clamp(SMALLEST, LARGEST))
        return self.middle(x, noise.dtype) + self.sigma * eps, noise.new_zeros(x.shape[0])

    def forward_by_place(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, log_det = self(x, noise)
        return v, torch.zeros_like(v[:, 0]), log_det


class RealValued(nn.Module):
    """Takes the place of `Dequantizer` for real-valued data, which it leaves unchanged."""

    num_bins = None
    sigma = None
    learns_noise = False
    of_entry = 0.0

    def check(self, x: Tensor) -> None:
        """Raises `ValueError` for a dtype that is not floating-point."""
        if not x.is_floating_point():
            raise ValueError(f"expected real numbers, got {x.dtype}")

    def forward(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        return x.to(noise.dtype), noise.new_zeros(x.shape[0])

    def forward_by_place(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.to(noise.dtype), torch.zeros_like(noise[:, 0]), noise.new_zeros(len(x))

    def middle(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.to(dtype)

    def to_unit(self, v: Tensor) -> Tensor:
        return v

    def to_data(self, v: Tensor) -> Tensor:
        _require_finite(v)
        return v

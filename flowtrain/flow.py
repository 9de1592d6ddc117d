"""The model: dequantization, a bijection and a standard normal base, with an exact likelihood bound."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.fused import layer_by_layer
from flowtrain.dequantize import Dequantizer, draw_noise


class LogProb(NamedTuple):
    """The parts of a single-draw bound on log P(x), each `(B,)` in nats; their sum is the bound."""

    base: Tensor  # log N(z; 0, I)
    log_det: Tensor  # every log-determinant, with -log q(u|x) - D log Q

    @property
    def total(self) -> Tensor:
        return self.base + self.log_det


class Flow(nn.Module):
    """A normalizing flow on images.

    `log P(x) >= E_u[log N(z; 0, I) + log|det| - log q(u|x)] - D log Q` (Theis et al. 2016; Ho et al. 2019), with D the
    number of entries of the image as stored and Q its number of levels.

    Args:
        bijection: data to latent, from `(B, C, H, W)` to `(B, D)`.
        dequantizer: integers to reals.
        shape: of one image, `(C, H, W)`.
    """

    def __init__(self, bijection: Bijection, dequantizer: Dequantizer, shape: tuple[int, int, int]):
        super().__init__()
        self.dequantizer = dequantizer  # first: parameters are in the order in which they are used
        self.bijection = bijection
        self.shape = shape

    @property
    def levels(self) -> int:
        """Q: images have values 0..Q-1."""
        return self.dequantizer.levels

    @property
    def dims(self) -> int:
        """D, the number of entries of an image."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, noise: Tensor) -> LogProb:
        """The single-draw bound for integers `x` `(B, C, H, W)`, given uniform noise of that shape, in its parts."""
        v, log_det = self.dequantizer(x, noise.to(self.dtype))
        z, flow_log_det = self.bijection(v)
        base = -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
        return LogProb(base, log_det + flow_log_det)

    def log_prob(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Single-draw bound on log P(x), nats, `(B,)`.

        Args:
            x: integers in 0..Q-1, `(B, C, H, W)`; unchanged.
            generator: for the dequantization noise; a CPU one gives an image the same noise in a batch of any size.

        Raises:
            ValueError: for another shape, a dtype that is not integral, or a value outside 0..Q-1.
        """
        x = self._checked(x)
        return self(x, draw_noise(x.shape, generator, x.device)).total

    def bits_per_dim(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Single-draw bound in bits per dimension, `(B,)`: `-log P(x) / (D log 2)`. Arguments as `log_prob`."""
        return bits_per_dim(self.log_prob(x, generator), self.dims)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The latent at the middle of each image's bin, `(B, D)`: no randomness, so that `decode` gives `x` back."""
        v = self.dequantizer.middle(self._checked(x), self.dtype)
        return self.bijection(v)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents `(B, D)` to images, uint8 `(B, C, H, W)`. Raises `FloatingPointError` where they are not finite."""
        return self.dequantizer.to_levels(self.bijection.inverse(z.to(self.device))[0]).contiguous()

    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """`n` images from the model, uint8 `(n, C, H, W)`; the base's standard deviation is `temperature`."""
        return self.decode(temperature * self.draw_latents(n, generator))

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` standard normal latents, `(n, D)`, row by row: the first ones do not depend on how many follow."""
        where = self.device if generator is None else generator.device
        rows = [torch.randn(self.dims, generator=generator, device=where) for _ in range(n)]
        return torch.stack(rows).to(self.device, self.dtype)

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """`(B, D)` to the latents of each level, finest first, each `(B, C, H, W)`."""
        return self.bijection.split_latents(z)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape or x.ndim != 4:
            raise ValueError(f"expected images of shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"expected integers in 0..{self.levels - 1}, got {x.dtype}")
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= self.levels):  # int: 256 wraps to 0 in uint8
            raise ValueError(f"expected values in 0..{self.levels - 1}, got {int(x.min())}..{int(x.max())}")
        return x.to(self.device)


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Nats of an image to bits per dimension: `-log P / (D log 2)`."""
    return log_prob / (-dims * math.log(2))


@torch.no_grad()
def initialize(flow: Flow, x: Tensor, noise: Tensor) -> None:
    """Data-dependent initialization: one pass in which each layer sets itself from its actual input, in order.

    Every module with a method `initialize(*inputs)` takes part; one that is initialized already leaves itself alone.
    """
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: module.initialize(*inputs))
        for module in flow.modules()
        if hasattr(module, "initialize")
    ]
    try:
        with layer_by_layer():
            flow(x, noise)
    finally:
        for hook in hooks:
            hook.remove()

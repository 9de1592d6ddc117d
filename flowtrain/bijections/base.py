"""The contract of an invertible layer, and the one place where log-determinants are added up."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowtrain.memory import recomputes


class Bijection(nn.Module):
    """An invertible map of one example's tensor: `forward` is data to latent, `inverse` latent to data.

    Both return the result and `log_det`, the log of the absolute Jacobian determinant **of the direction
    just computed**, in nats, per example, shape `(B,)`. Nothing may depend on the rest of the batch.
    `context` is extra input that a conditional layer may read, shape `(B, C', H, W)`.

    A layer that sets itself from data has a method `initialize(x, context)`, which
    `flowtrain.flow.initialize` calls once with the layer's actual input.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """The latent of each level, coarsest last: `(B, D)` to a list of `(B, C, H, W)`, or `[z]`."""
        return [z]


class Sequential(Bijection):
    """Bijections one after the other; the sum of their log-determinants."""

    def __init__(self, *layers: Bijection):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            if recomputes():
                x, log_det = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x, log_det = layer(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z, context)  # type: ignore[operator]
            total = total + log_det
        return z, total

    def split_latents(self, z: Tensor) -> list[Tensor]:
        return self.layers[-1].split_latents(z)  # type: ignore[operator]


def sum_per_example(values: Tensor) -> Tensor:
    """Sum over everything but the batch: `(B, ...)` to `(B,)`."""
    return values.sum(dim=tuple(range(1, values.ndim)))


def bounded(values: Tensor, limit: float) -> Tensor:
    """`limit * tanh(values / limit)`: a log-scale that cannot blow up a layer in either direction."""
    return limit * torch.tanh(values / limit)


def unbounded(values: Tensor, limit: float) -> Tensor:
    """The inverse of `bounded`, for values clipped to 0.99 of the limit."""
    return limit * torch.atanh((values / limit).clamp(-0.99, 0.99))

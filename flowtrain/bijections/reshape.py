"""Layers that only move entries: their log-determinant is zero."""

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.context import Context


class Squeeze(Bijection):
    """Turns each 2x2 patch into channels: `(B, C, H, W)` to `(B, 4C, H/2, W/2)`.

    The halves of the channels are the colours of a checkerboard (RealNVP, section 3.6, figure 3).
    """

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        patches = [x[:, :, i::2, j::2] for i, j in self.OFFSETS]
        return torch.cat(patches, dim=1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = z.shape
        x = z.new_empty(batch, channels // 4, 2 * height, 2 * width)
        for (i, j), patch in zip(self.OFFSETS, z.chunk(4, dim=1), strict=True):
            x[:, :, i::2, j::2] = patch
        return x, z.new_zeros(batch)


class Flatten(Bijection):
    """`(B, C, H, W)` to `(B, C*H*W)`, for models on vectors."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return z.reshape(-1, *self.shape), z.new_zeros(z.shape[0])


class Permute(Bijection):
    """A fixed permutation of dimension 1 (channels, or entries of a vector), kept as a buffer."""

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Tensor):
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.inverse_order], z.new_zeros(z.shape[0])


class Reverse(Bijection):
    """Reverses the raster order of the pixels of `(B, C, H, W)`, by half a turn of the image."""

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(2, 3), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(z)


class HalvePixels(Bijection):
    """Puts half of the pixels into the first half of the channels, and the rest into the second.

    It maps `(B, C, H, W)` to `(B, C, 2, H W / 2)`, with C and H W even; `first` `(H, W)` is true
    for half of the pixels. The channels of a pixel are cut in two, so that there are as many places
    as before. A coupling then keeps some pixels and changes others (Jet, section 3).
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, first: Tensor):
        super().__init__()
        self.size = tuple(first.shape)
        order = first.flatten().logical_not().int().argsort(stable=True)
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        parts = x.flatten(2)[:, :, self.order].unflatten(1, (2, -1)).unflatten(3, (2, -1))
        return parts.permute(0, 3, 2, 1, 4).flatten(1, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        parts = z.unflatten(1, (2, -1)).permute(0, 3, 2, 1, 4)
        pixels = parts.flatten(3).flatten(1, 2)[:, :, self.inverse_order]
        return pixels.unflatten(2, self.size), z.new_zeros(z.shape[0])

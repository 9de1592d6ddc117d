"""Convolutional conditioners of images: Glow's, and the layers that all of them are made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowtrain.types import Shape


class Conv2d(nn.Linear):
    """A convolution of odd kernel size `k`, `(B, C, H, W)` to `(B, C', H, W)`.

    Its weight is a matrix, `(C', k * k * C)`, because Muon takes matrices. As filters, it has the
    channels last in memory, like the activations of conditioners.
    """

    outside = 0.0  # the input outside of the image

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True):
        super().__init__(kernel_size**2 * in_channels, out_channels, bias)
        self.kernel_size = kernel_size

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filters = weight.unflatten(1, (self.kernel_size, self.kernel_size, -1)).movedim(-1, 1)
        padding = self.kernel_size // 2
        if self.outside:
            x, padding = F.pad(x, 4 * [padding], value=self.outside), 0
        return F.conv2d(x, filters, bias, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)


class ZeroConv2d(Conv2d):
    """A convolution that starts at zero, with a learned gain `exp(3 * log_gain)` per channel.

    As in the Glow release, it lets the outputs grow faster than Adam's steps would. The input is
    `outside` beyond the edges of the image.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, outside: float = 0.0):
        super().__init__(in_channels, out_channels, kernel_size)
        self.outside = outside
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = (3 * self.log_gain).exp()
        # The weights take the gain, because they are smaller than the activations.
        return self._convolve(x, self.weight * gain[:, None], self.bias * gain)


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """`x` with the channels of the context, which is brought to the size of `x`."""
    if context is None:
        return x
    return torch.cat([x, resized(context, (x.shape[-2], x.shape[-1]))], dim=1)


def resized(context: Tensor, size: tuple[int, int]) -> Tensor:
    """A context `(B, C, H, W)` at another resolution, with `channels_of` channels.

    Patches of a larger one become channels, and a smaller one is repeated.
    """
    height = context.shape[-2]
    if height < size[0]:
        return F.interpolate(context, size)
    return context if height == size[0] else F.pixel_unshuffle(context, height // size[0])


def channels_of(context: Shape | None, size: tuple[int, int]) -> int:
    """The number of channels of a context of shape `(C, H, W)` where it is `resized`, or 0."""
    if context is None:
        return 0
    channels, height, _ = context
    return channels * max(1, height // size[0]) ** 2


class _IntegerReLU(torch.autograd.Function):
    """ReLU of bfloat16, in place, on its bits as 16-bit integers.

    On a CPU this is three times as fast, forward and backward. As integers, numbers >= 0 stay >= 0,
    minus infinity is -128, and all other negative numbers are below -128. The integers from -127 to
    -1 are NaN with a sign, and stay NaN (a ReLU fused into oneDNN's convolution would hide them).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        torch.threshold_(x.view(torch.int16), -128, 0)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        passed: Tensor = torch.ops.aten.threshold_backward(
            grad.view(torch.int16), y.view(torch.int16), 0
        )
        return passed.view(torch.bfloat16)


def relu_(x: Tensor) -> Tensor:
    on_integers = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    # torch's compiler has no vector instructions for 16-bit integers, so a step takes 1.5 times as
    # long.
    on_integers = on_integers and not torch.compiler.is_compiling()
    y: Tensor = _IntegerReLU.apply(x) if on_integers else F.relu_(x)
    return y


class ReLU(nn.Module):
    """ReLU in place, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_(x)


class GlowNet(nn.Module):
    """Glow's conditioner (section 3.3, appendix B): 3x3 - ReLU - 1x1 - ReLU - zero 3x3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        context_channels: int = 0,
        outside: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2d(in_channels + context_channels, width, 3),
            ReLU(),
            Conv2d(width, width, 1),
            ReLU(),
            ZeroConv2d(width, out_channels, 3, outside),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.layers(with_context(x, context))
        return parameters


class PreactivatedNet(GlowNet):
    """Glow's conditioner behind a 1x1 convolution and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        context_channels: int = 0,
        outside: float = 0.0,
    ):
        super().__init__(in_channels, out_channels, width, context_channels, outside)
        inputs = in_channels + context_channels
        self.layers = nn.Sequential(Conv2d(inputs, inputs, 1), ReLU(), *self.layers)


class ZeroNet(nn.Module):
    """One zero convolution: Glow's learned prior of a half, `split2d_prior` in the release."""

    def __init__(
        self, in_channels: int, out_channels: int, context_channels: int = 0, outside: float = 0.0
    ):
        super().__init__()
        self.layer = ZeroConv2d(in_channels + context_channels, out_channels, 3, outside)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.layer(with_context(x, context))
        return parameters


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each pixel, as in Flow++ (Ho et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

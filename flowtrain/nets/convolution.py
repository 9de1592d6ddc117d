"""Conditioner networks: from the kept part of a coupling (and context) to the parameters of its
transform.

Every last layer starts at zero, so that every coupling starts as the identity (Glow, section 3.3).
Called as `net(kept, context)`; under autocast these networks, and nothing else, run in low
precision.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Conv2d(nn.Linear):
    """A convolution of odd size `k` that keeps the image's, `(B, C, H, W)` to `(B, C', H, W)`.

    Its weight is a matrix, `(C', k * k * C / groups)`: what Muon takes, and as filters the order in
    memory that goes with the activations of conditioners (channels last).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        groups: int = 1,
    ):
        super().__init__(kernel_size**2 * in_channels // groups, out_channels, bias)
        self.kernel_size = kernel_size
        self.groups = groups

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filters = weight.unflatten(1, (self.kernel_size, self.kernel_size, -1)).movedim(-1, 1)
        return F.conv2d(x, filters, bias, padding=self.kernel_size // 2, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)


class ZeroConv2d(Conv2d):
    """A convolution that starts at zero, with a learned gain of each output channel: `exp(3 *
    log_gain)`.

    As in the Glow release: the gain lets the outputs grow faster than the rate of Adam's steps
    would.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = (3 * self.log_gain).exp()
        # On the weights, which are smaller than the activations.
        return self._convolve(x, self.weight * gain[:, None], self.bias * gain)


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """`x` for a conditioner, with the context's channels, averaged down to the size of `x` where it
    is larger.
    """
    if context is None:
        return x
    if context.shape[-2:] != x.shape[-2:]:
        context = F.adaptive_avg_pool2d(context, (x.shape[-2], x.shape[-1]))
    return torch.cat([x, context], dim=1)


class _IntegerReLU(torch.autograd.Function):
    """ReLU of bfloat16, in place, on its bits as 16-bit integers: three times as fast on a CPU,
    forward and backward.

    As integers the numbers >= 0 are >= 0, minus infinity is -128, everything negative is below that
    or equal, and what lies between is NaN with a sign: it stays NaN, as it must (a ReLU fused into
    oneDNN's convolution would hide it).
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
        passed = torch.ops.aten.threshold_backward(grad.view(torch.int16), y.view(torch.int16), 0)
        return passed.view(torch.bfloat16)


def relu_(x: Tensor) -> Tensor:
    """ReLU in place."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return _IntegerReLU.apply(x)
    return F.relu_(x)


class ReLU(nn.Module):
    """ReLU in place, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_(x)


class GlowNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - zero 3x3 (Glow, section 3.3 and appendix B): `(B, C, H, W)` to `(B,
    C', H, W)`.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, context_channels: int = 0):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2d(in_channels + context_channels, width, 3),
            ReLU(),
            Conv2d(width, width, 1),
            ReLU(),
            ZeroConv2d(width, out_channels, 3),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(with_context(x, context))


class ZeroNet(nn.Module):
    """One zero convolution: Glow's learned prior of a factored-out half (the release's
    `split2d_prior`).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layer = ZeroConv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each pixel, `(B, C, H, W)` (as in Flow++, Ho et al.
    2019).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

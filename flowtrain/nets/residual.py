"""Residual conditioners of images: RealNVP's, and gated ones."""

from torch import Tensor, nn

from flowtrain.bijections.actnorm import ActNorm
from flowtrain.nets.convolution import ChannelNorm, Conv2d, ReLU, ZeroConv2d, relu_, with_context


class _ResidualBlock(nn.Module):
    """Adds two 3x3 convolutions, each after normalization and ReLU (He et al. 2016, ResNet v2)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = ActNorm((width, 1, 1)), ActNorm((width, 1, 1))
        self.conv1 = Conv2d(width, width, 3, bias=False)
        self.conv2 = Conv2d(width, width, 3)

    def initialize(self, x: Tensor) -> None:
        self.norm1.initialize(x)
        self.norm2.initialize(self.conv1(relu_(self.norm1(x)[0])))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(relu_(self.norm1(x)[0]))
        h = self.conv2(relu_(self.norm2(h)[0]))
        return x + h


class ResidualNet(nn.Module):
    """The residual conditioner of RealNVP (section 3.7): 3x3, `blocks` residual blocks, zero 1x1.

    It has ActNorm where the paper has batch normalization, so that no example depends on the rest
    of its batch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        blocks: int,
        context_channels: int = 0,
    ):
        super().__init__()
        self.first = Conv2d(in_channels + context_channels, width, 3)
        self.blocks = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.norm = ActNorm((width, 1, 1))
        self.last = ZeroConv2d(width, out_channels, 1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        h = self.first(with_context(x, context))
        for block in self.blocks:
            block.initialize(h)  # type: ignore[operator]
            h = block(h)
        self.norm.initialize(h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.blocks(self.first(with_context(x, context)))
        parameters: Tensor = self.last(relu_(self.norm(h)[0]))
        return parameters


class _GatedBlock(nn.Sequential):
    """Adds the result of its layers to `x`."""

    def __init__(self, width: int):
        convolutions = Conv2d(width, width, 3), ReLU(), Conv2d(width, 2 * width, 1)
        super().__init__(ChannelNorm(width), *convolutions, nn.GLU(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = super().forward(x)
        return x + h


class GatedNet(nn.Module):
    """Residual blocks `a * sigmoid(b)`, similar to Flow++ (section 3.3).

    It maps `(B, C, H, W)` to `(B, C', H, W)`. Normalization, 3x3, ReLU and 1x1 give `a` and `b`.
    Flow++ has a concatenated ELU instead of ReLU, normalization elsewhere than at the entrance of a
    block, and attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        blocks: int,
        context_channels: int = 0,
        outside: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2d(in_channels + context_channels, width, 3),
            *(_GatedBlock(width) for _ in range(blocks)),
            ReLU(),
            ZeroConv2d(width, out_channels, 3, outside),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.layers(with_context(x, context))
        return parameters

"""Causal networks over tokens: patches of an image, in raster order.

A token has E entries. The parameters of an entry depend only on earlier tokens, and on earlier
entries of its own token. Inside a network an image lies as rows of tokens, `(B, H, W, C)`. Each
network has two paths to the same numbers: all tokens at once, and token by token.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowtrain.bijections.ordinal import TokenNet
from flowtrain.nets.causal_blocks import (
    AttentionBlock,
    Block,
    ConvolutionBlock,
    PixelAttentionBlock,
    PixelConvolutionBlock,
    norm,
    norm_of_columns,
)
from flowtrain.nets.coarse import CoarseStream
from flowtrain.nets.convolution import Conv2d, ReLU, channels_of, resized
from flowtrain.nets.dropout import Drop, Dropout, keep_all
from flowtrain.nets.token_head import HeadByEntry, TokenHead
from flowtrain.nets.window import CausalConv, Window
from flowtrain.types import Shape


class CausalNet(TokenNet):
    """Residual blocks over tokens, then a masked network within the token.

    A context adds to the features. It is a class `(B, C')`; the mean of the unit vectors stands for
    an unknown class. Or it is an image `(B, C', H', W')` of shape `image`, of which two
    convolutions see the surroundings of a token, to all sides. Or it is one of the `orders` but the
    first, `(B, orders - 1)`: a unit vector, or zeros for the first one.

    The blocks are convolutions, and between them at equal distances `attention` blocks of
    attention. With `pixels` both see pixels, too. A coarse stream of `downsample` blocks is in the
    middle. With `noise`, as in a training step, each block drops entries with the probability
    `dropout`, by the bits of `noise`.
    """

    def __init__(
        self,
        entries: int,
        size: tuple[int, int],
        start: Tensor,
        width: int,
        blocks: int,
        units: int,
        window: Window,
        classes: int = 0,
        image: Shape | None = None,
        attention: int = 0,
        pixels: bool = False,
        downsample: int = 0,
        dropout: float = 0.0,
        orders: int = 1,
    ):
        super().__init__()
        self.entries, self.size = entries, size
        self.first = CausalConv(2 * entries, width, window)
        self.position = nn.Parameter(torch.zeros(*size, width))
        self.blocks = nn.ModuleList(
            _blocks(width, blocks, attention, downsample, size, 2 * entries * pixels)
        )
        self.dropout = dropout
        self.head = TokenHead(entries, width, units, start)
        self.context = nn.Linear(classes, width, bias=False) if classes else None
        self.orders = orders
        self.of_orders = nn.Linear(orders - 1, width, bias=False) if orders > 1 else None
        self.around = None
        if image is not None:
            first = Conv2d(channels_of(image, size), width, 3)
            self.around = nn.Sequential(first, ReLU(), Conv2d(width, width, 3))

    def added(self, context: Tensor | None) -> Tensor:
        """Position and context, `(B or 1, H, W, C)`, which are added to the features."""
        of_context: Tensor | float = 0.0
        if self.around is not None:
            assert context is not None
            of_context = self.around(resized(context, self.size)).movedim(1, -1)
        elif self.context is not None and context is None:
            of_context = self.context.weight.mean(dim=1)
        elif self.context is not None:
            of_context = self.context(context)[:, None, None]
        elif self.of_orders is not None and context is not None:
            of_context = self.of_orders(context)[:, None, None]
        return self.position[None] + of_context

    def forward(
        self, x: Tensor, context: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        rows = x.movedim(1, -1)
        pixels = rows[..., : 2 * self.entries]
        h = self.first(pixels)
        h = h + self.added(context).to(h.dtype)
        drop: Drop = keep_all
        if self.dropout and noise is not None:
            drop = Dropout(self.dropout, noise)
        for block in self.blocks:
            h = block(h, drop, pixels)
        parameters: Tensor = self.head(rows, norm(h))
        return parameters.movedim(-1, 1)

    def by_token(self, seen: Tensor, context: Tensor | None = None) -> "_CausalNetByToken":
        return _CausalNetByToken(self, seen, context)


def _blocks(
    width: int,
    convolutions: int,
    attention: int,
    downsample: int,
    size: tuple[int, int],
    pixels: int,
) -> Iterator[Block]:
    """The blocks of `CausalNet`, in their order. They see so many `pixels` of each token."""
    for n in range(convolutions + 1):
        if downsample and n == convolutions // 2:
            yield CoarseStream(width, downsample, size)
        after = [k for k in range(attention) if (k + 1) * convolutions // (attention + 1) == n]
        for _ in after:
            yield PixelAttentionBlock(width, pixels, size) if pixels else AttentionBlock(width)
        if n < convolutions:
            window = Window(1, 1, ahead=1)
            yield (
                PixelConvolutionBlock(width, window, pixels)
                if pixels
                else ConvolutionBlock(width, window)
            )


class _CausalNetByToken(HeadByEntry):
    """See `NetByToken`. Each column of features is computed once."""

    def __init__(self, net: CausalNet, seen: Tensor, context: Tensor | None):
        super().__init__(net.head, seen)
        self.pixels = seen[: 2 * net.entries]
        self.added = net.added(context).permute(1, 2, 3, 0)  # (H, W, C, B or 1)
        self.conv = net.first.by_token(seen.shape[1], net.size[1])
        blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
        self.blocks = [block.by_token(self.pixels, net.size) for block in blocks]

    def start(self, i: int, j: int) -> None:
        self.conv.start(j)
        h = self.conv.column(j) + self.added[i, j]
        for block in self.blocks:
            h = block.column(h, i, j)
        self.begin(norm_of_columns(h))

    def end(self, i: int, j: int) -> None:
        self.conv.write(j, self.pixels)

"""Causal networks over tokens: patches of an image, in raster order.

A token has E entries. What the networks say of a token depends only on the tokens before it, and
on the entries of the token itself that come before. Inside a network an image lies as rows of
tokens, `(B, H, W, C)`. Each network has two paths to the same numbers: all tokens at once, and
token by token, which computes each column of features once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.ordinal import TokenNet
from flowtrain.nets.convolution import relu_
from flowtrain.nets.token_head import HeadByEntry, TokenHead
from flowtrain.nets.window import CausalConv, Window


class _Block(nn.Module):
    """A residual block: normalization, a causal convolution, ReLU, and 1x1 that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.conv = CausalConv(width, width, Window(1, 1, itself=True))
        self.last = nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.last(relu_(self.conv(self.norm(x))))
        return y


class _BlockByToken:
    """A `_Block` that computes one column `(C, B)` after the other."""

    def __init__(self, block: _Block, batch: int, width: int):
        self.conv = block.conv.by_token(batch, width)
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]

    def column(self, x: Tensor, j: int) -> Tensor:
        self.conv.start(j)
        self.conv.write(j, _norm_of_columns(x))
        return torch.addmm(x, self.weight, self.conv.column(j).relu_()).add_(self.bias)


def _norm_of_columns(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(C, B)`."""
    x = x - x.mean(dim=0)
    return x.mul_((x.square().mean(dim=0) + 1e-5).rsqrt_())


class CausalNet(TokenNet):
    """Causal convolutions over tokens, then a masked network within the token.

    It maps the values, the residuals and the linear predictions of the entries, `(B, 3E, H, W)`, to
    `(B, P E, H, W)`. A context `(B, C')`, or `(B, C', H', W')` averaged down to the tokens, adds to
    the features. Without one it is the mean of the unit vectors, which stands for an unknown class.
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
        context_channels: int = 0,
    ):
        super().__init__()
        self.entries, self.size = entries, size
        self.first = CausalConv(2 * entries, width, window)
        self.position = nn.Parameter(torch.zeros(*size, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = TokenHead(entries, width, units, start)
        self.context = nn.Linear(context_channels, width, bias=False) if context_channels else None

    def added(self, context: Tensor | None) -> Tensor:
        """What position and context add to the features of the tokens, `(B or 1, H, W, C)`."""
        if self.context is None:
            return self.position[None]
        if context is None:
            return self.position[None] + self.context.weight.mean(dim=1)
        if context.ndim == 2:
            context = context[..., None, None]
        elif context.shape[-2:] != self.size:
            context = F.adaptive_avg_pool2d(context, self.size)
        added: Tensor = self.position + self.context(context.movedim(1, -1))
        return added

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        rows = x.movedim(1, -1)
        h = self.first(rows[..., : 2 * self.entries])
        h = h + self.added(context).to(h.dtype)
        for block in self.blocks:
            h = block(h)
        parameters: Tensor = self.head(rows, F.layer_norm(h, h.shape[-1:]))
        return parameters.movedim(-1, 1)

    def by_token(self, seen: Tensor, context: Tensor | None = None) -> "_CausalNetByToken":
        return _CausalNetByToken(self, seen, context)


class _CausalNetByToken(HeadByEntry):
    """See `NetByToken`. Each column of features is computed once."""

    def __init__(self, net: CausalNet, seen: Tensor, context: Tensor | None):
        super().__init__(net.head, seen)
        batch, width = seen.shape[1], net.size[1]
        self.added = net.added(context).permute(1, 2, 3, 0)  # (H, W, C, B or 1)
        self.conv = net.first.by_token(batch, width)
        blocks: list[_Block] = list(net.blocks)  # type: ignore[arg-type]
        self.blocks = [_BlockByToken(block, batch, width) for block in blocks]

    def start(self, i: int, j: int) -> None:
        self.conv.start(j)
        h = self.conv.column(j) + self.added[i, j]
        for block in self.blocks:
            h = block.column(h, j)
        self.begin(_norm_of_columns(h))

    def end(self, i: int, j: int) -> None:
        self.conv.write(j, self.seen[: 2 * len(self.seen) // 3])

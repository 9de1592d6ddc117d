"""Residual blocks of causal networks: convolutions and attention over tokens in raster order.

Each computes all tokens at once, or one after the other with the same result.
"""

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.attention import KeysAndValues, heads_of
from flowtrain.nets.convolution import relu_
from flowtrain.nets.dropout import Drop
from flowtrain.nets.window import CausalConv, Window

HEAD = 32  # channels of an attention head, about
EPSILON = 1e-5  # of layer norm


class BlockByToken(Protocol):
    """A `Block` that computes the features of one token after the other."""

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        """The features `(C, B)` of token `(i, j)`. Tokens come in raster order."""


class Block(nn.Module):
    """A residual block of rows of tokens, `(B, H, W, C)`, each of which sees tokens up to itself.

    `drop` drops some entries before they are added. `pixels` `(B, H, W, 2E)` are values and
    residuals of the entries of each token. Only later tokens may depend on them.
    """

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor, drop: Drop, pixels: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, drop: Drop, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> BlockByToken:
        """The same for one token after the other. When a token begins, `pixels` `(2E, B)` are of
        the token before it, or zeros.
        """
        raise NotImplementedError


class ConvolutionBlock(Block):
    """Normalization, a causal convolution, ReLU, and a 1x1 convolution that starts at zero."""

    def __init__(self, width: int, window: Window):
        super().__init__()
        self.conv = CausalConv(width, width, window)
        self.last = zero_linear(width, width)

    def forward(self, x: Tensor, drop: Drop, pixels: Tensor) -> Tensor:
        y: Tensor = x + self.last(drop(relu_(self.hidden(norm(x), pixels))))
        return y

    def hidden(self, x: Tensor, pixels: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> "ConvolutionByToken":
        return ConvolutionByToken(self, pixels.shape[1], size[1])


class ConvolutionByToken:
    """See `BlockByToken`. If the window reaches to the right, a row is written before `read`."""

    def __init__(self, block: ConvolutionBlock, batch: int, width: int):
        self.conv = block.conv.by_token(batch, width)
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]

    def write(self, x: Tensor, j: int) -> None:
        self.conv.start(j)
        self.conv.write(j, norm_of_columns(x))

    def read(self, x: Tensor, j: int) -> Tensor:
        return torch.addmm(x, self.weight, self.hidden(j).relu_()).add_(self.bias)

    def hidden(self, j: int) -> Tensor:
        return self.conv.column(j)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        self.write(x, j)
        return self.read(x, j)


class PixelConvolutionBlock(ConvolutionBlock):
    """The same, with a convolution of the `pixels` of earlier tokens, which starts at zero, too.

    Blocks far from the input need not carry pixels along in their features.
    """

    def __init__(self, width: int, window: Window, pixels: int):
        super().__init__(width, window)
        self.of_pixels = CausalConv(pixels, width, Window(window.above, window.beside, ahead=0))
        nn.init.zeros_(self.of_pixels.weight)
        nn.init.zeros_(self.of_pixels.bias)

    def hidden(self, x: Tensor, pixels: Tensor) -> Tensor:
        y: Tensor = super().hidden(x, pixels) + self.of_pixels(pixels)
        return y

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> "_PixelConvolutionByToken":
        return _PixelConvolutionByToken(self, pixels, size[1])


class _PixelConvolutionByToken(ConvolutionByToken):
    def __init__(self, block: PixelConvolutionBlock, pixels: Tensor, width: int):
        super().__init__(block, pixels.shape[1], width)
        self.pixels, self.last_column = pixels, width - 1
        self.of_pixels = block.of_pixels.by_token(pixels.shape[1], width)

    def hidden(self, j: int) -> Tensor:
        return super().hidden(j) + self.of_pixels.column(j)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        # The token before it is in the row above if this one is the first of its row.
        self.of_pixels.write(j - 1 if j else self.last_column, self.pixels)
        self.of_pixels.start(j)
        return super().column(x, i, j)


class AttentionBlock(Block):
    """Normalization, causal self-attention over all tokens (Vaswani et al. 2017) with normalized
    queries and keys (Henry et al. 2020), and a projection that starts at zero.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = heads_of(width, HEAD)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.last = zero_linear(width, width)

    def queries_keys_and_values(self, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all normalized tokens `(B, N, C)`, `(B, heads, N, C / heads)` each."""
        parts = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        return norm(queries), norm(keys), values

    def forward(self, x: Tensor, drop: Drop, pixels: Tensor) -> Tensor:
        parts = self.queries_keys_and_values(norm(x).flatten(1, 2), pixels.flatten(1, 2))
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        y: Tensor = x + self.last(drop(mixed.transpose(1, 2).reshape(x.shape)))
        return y

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> "_AttentionByToken":
        return _AttentionByToken(self, pixels, math.prod(size))


class _AttentionByToken:
    def __init__(self, block: AttentionBlock, pixels: Tensor, tokens: int):
        self.block, self.pixels = block, pixels.T[:, None]
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]
        width, heads = len(self.weight), block.heads
        self.kept = KeysAndValues(tokens, (len(self.pixels), heads, width // heads), self.weight)

    def next(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the next normalized token `(B, 1, C)`."""
        return self.block.queries_keys_and_values(x, self.pixels)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        mixed = self.kept.attend(*self.next(norm_of_columns(x).T[:, None]))
        return torch.addmm(x, self.weight, mixed.flatten(1).T).add_(self.bias)


class PixelAttentionBlock(AttentionBlock):
    """Attention whose keys and values contain the `pixels` of their tokens (as in PixelSNAIL, Chen
    et al. 2018, arXiv:1712.09763). So a token sees all tokens before it, and beside them a key and
    a value of zero.

    Queries and keys are rotated by row and column of their tokens, so products depend on distances
    (axial; Heo et al. 2024, arXiv:2403.13298). Each head has a learned temperature.
    """

    turns: Tensor

    def __init__(self, width: int, pixels: int, size: tuple[int, int]):
        super().__init__(width)
        self.of_pixels = nn.Linear(pixels, 2 * width, bias=False)
        self.inverse_temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.register_buffer("turns", _turns(size, width // self.heads // 4), persistent=False)

    def after(
        self, before: Tensor, pixels: Tensor, x: Tensor, places: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of tokens `x`, and keys and values of the tokens `before` them, with their pixels
        `(B, N, 2E)`. The tokens are in these `places` in raster order.
        """
        of_queries, of_others = self.queries_keys_values.weight.tensor_split([x.shape[-1]])
        others = F.linear(before, of_others) + self.of_pixels(pixels)
        keys, values = others.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries = F.linear(x, of_queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        queries = self.inverse_temperature * _rotated(norm(queries), self.turns[:, 1:][:, places])
        return queries, _rotated(norm(keys), self.turns[:, :-1][:, places]), values

    def queries_keys_and_values(self, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, pixels = (F.pad(each, (0, 0, 1, -1)) for each in (x, pixels))
        return self.after(before, pixels, x, slice(None))

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> "_PixelAttentionByToken":
        return _PixelAttentionByToken(self, pixels, math.prod(size))


class _PixelAttentionByToken(_AttentionByToken):
    block: PixelAttentionBlock

    def __init__(self, block: PixelAttentionBlock, pixels: Tensor, tokens: int):
        super().__init__(block, pixels, tokens)
        self.before = pixels.new_zeros(len(self.pixels), 1, len(self.weight))

    def next(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = slice(self.kept.known, self.kept.known + 1)
        parts = self.block.after(self.before, self.pixels, x, place)
        self.before = x
        return parts


def _turns(size: tuple[int, int], count: int) -> Tensor:
    """Cosines and sines `(2, 1 + H W, 2 count)` of the angles of all tokens, after a first one.

    Angles are row and column times each of `count` frequencies, which fall from 1 to about 1/100.
    """
    frequencies = 100 ** -(torch.arange(count) / max(1, count))
    places = torch.cartesian_prod(*map(torch.arange, size)).view(-1, 2, 1)
    angles = F.pad((places * frequencies).flatten(1), (0, 0, 1, 0))
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates pairs of channels of `(..., N, C)`: the first channels, and as many after them."""
    cos, sin = turns
    count = cos.shape[-1]
    one, other, rest = x.tensor_split([count, 2 * count], dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos, rest], dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(..., C)`, without weights, because a linear map follows.

    The result has the precision of `x`; autocast on CUDA would make it float32.
    """
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON).to(x.dtype)


def norm_of_columns(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(C, B)`."""
    x = x - x.mean(dim=0)
    return x.mul_((x.square().mean(dim=0) + EPSILON).rsqrt_())


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

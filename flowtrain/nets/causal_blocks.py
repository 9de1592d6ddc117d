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

    `drop` drops some entries before they are added.
    """

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor, drop: Drop) -> Tensor: ...

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        raise NotImplementedError

    def by_token(self, batch: int, size: tuple[int, int]) -> BlockByToken:
        """The same for one token after the other."""
        raise NotImplementedError


class ConvolutionBlock(Block):
    """Normalization, a causal convolution, ReLU, and a 1x1 convolution that starts at zero."""

    def __init__(self, width: int, window: Window):
        super().__init__()
        self.conv = CausalConv(width, width, window)
        self.last = zero_linear(width, width)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        y: Tensor = x + self.last(drop(relu_(self.conv(norm(x)))))
        return y

    def by_token(self, batch: int, size: tuple[int, int]) -> "ConvolutionByToken":
        return ConvolutionByToken(self, batch, size[1])


class ConvolutionByToken:
    """See `BlockByToken`. If the window reaches to the right, a row is written before `read`."""

    def __init__(self, block: ConvolutionBlock, batch: int, width: int):
        self.conv = block.conv.by_token(batch, width)
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]

    def write(self, x: Tensor, j: int) -> None:
        self.conv.start(j)
        self.conv.write(j, norm_of_columns(x))

    def read(self, x: Tensor, j: int) -> Tensor:
        """The result in column j for the input `x`."""
        return torch.addmm(x, self.weight, self.conv.column(j).relu_()).add_(self.bias)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        self.write(x, j)
        return self.read(x, j)


class AttentionBlock(Block):
    """Normalization, causal self-attention over all tokens (Vaswani et al. 2017) with normalized
    queries and keys (Henry et al. 2020), and a projection that starts at zero.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = heads_of(width, HEAD)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.last = zero_linear(width, width)

    def queries_keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of N normalized tokens `(B, N, C)`, `(B, heads, N, C / heads)` each."""
        parts = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        return norm(queries), norm(keys), values

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        queries, keys, values = self.queries_keys_and_values(norm(x).flatten(1, 2))
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        y: Tensor = x + self.last(drop(mixed.transpose(1, 2).reshape(x.shape)))
        return y

    def by_token(self, batch: int, size: tuple[int, int]) -> "_AttentionByToken":
        return _AttentionByToken(self, batch, math.prod(size))


class _AttentionByToken:
    def __init__(self, block: AttentionBlock, batch: int, tokens: int):
        self.block = block
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]
        width, heads = len(self.weight), block.heads
        self.kept = KeysAndValues(tokens, (batch, heads, width // heads), self.weight)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        normalized = norm_of_columns(x).T[:, None]
        query, key, value = self.block.queries_keys_and_values(normalized)
        mixed = self.kept.attend(query, key, value)
        return torch.addmm(x, self.weight, mixed.flatten(1).T).add_(self.bias)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(..., C)`, without weights, because a linear map follows."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def norm_of_columns(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(C, B)`."""
    x = x - x.mean(dim=0)
    return x.mul_((x.square().mean(dim=0) + EPSILON).rsqrt_())


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

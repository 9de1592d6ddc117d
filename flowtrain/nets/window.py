"""Causal convolutions over tokens in raster order: all tokens at once, or one after the other."""

import itertools
import math
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Window:
    """The tokens that a causal convolution sees at a token.

    These are the tokens of the `above` rows above it, up to `beside` columns to each side, and the
    `beside` tokens to the left. `ahead` = 1 adds the token itself, and more adds up to `beside`
    tokens to the right. In raster order they are the first `taps` of a rectangle.
    """

    def __init__(self, above: int, beside: int, ahead: int):
        self.above, self.beside = above, beside
        self.rectangle = (above + 1, 2 * beside + 1)
        self.taps = above * (2 * beside + 1) + beside + ahead

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Rows of tokens `(B, H, W, C)` and a weight `(C', taps * C)` to `(B, H, W, C')`."""
        weight = weight.unflatten(1, (self.taps, -1))
        weight = F.pad(weight, (0, 0, 0, math.prod(self.rectangle) - self.taps))
        filters = weight.unflatten(1, self.rectangle).movedim(-1, 1)
        rows = torch.cat([x.new_zeros(x.shape[0], self.above, *x.shape[2:]), x], dim=1)
        y = F.conv2d(rows.movedim(-1, 1), filters, bias, padding=(0, self.beside))
        return y.movedim(1, -1)

    def seen(self, x: Tensor) -> Tensor:
        """The input of the convolution at each token, `(B, H, W, taps * C)`."""
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, self.beside, self.beside, self.above, 0))
        taps = itertools.islice(itertools.product(*map(range, self.rectangle)), self.taps)
        return torch.cat([padded[:, i : i + height, j : j + width] for i, j in taps], dim=-1)


class WindowByToken:
    """A convolution of a `Window` that computes one column `(C', B)` after the other.

    It keeps the rows of tokens that the window reaches, `(beside + W + beside, C, B)` each.
    """

    def __init__(self, window: Window, weight: Tensor, bias: Tensor, batch: int, width: int):
        channels = weight.shape[1] // window.taps
        taps = [window.rectangle[1]] * window.above
        taps.append(window.taps - sum(taps))
        weights = weight.split([channels * n for n in taps], dim=1)
        self.parts = list(zip(weights, taps, strict=True))
        self.bias = bias[:, None]
        self.beside = window.beside
        row = weight.new_zeros(width + 2 * window.beside, channels, batch)
        self.rows = deque(row.clone() for _ in taps)

    def start(self, j: int) -> None:
        """Begins with a token in column j."""
        if j == 0:
            self.rows.rotate(-1)

    def column(self, j: int) -> Tensor:
        """The output `(C', B)` at the token in column j."""
        y = self.bias
        for (weight, taps), row in zip(self.parts, self.rows, strict=True):
            y = torch.addmm(y, weight, row[j : j + taps].flatten(0, 1))
        return y

    def write(self, j: int, column: Tensor) -> None:
        """Takes the input `(C, B)` at the token in column j."""
        self.rows[-1][self.beside + j] = column


class CausalConv(nn.Linear):
    """A convolution of the tokens in a window: `(B, H, W, C)` to `(B, H, W, C')`.

    Its weight is a matrix `(C', taps * C)`, because Muon takes matrices.
    """

    def __init__(self, inputs: int, outputs: int, window: Window):
        super().__init__(window.taps * inputs, outputs)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return self.window.convolve(x, self.weight, self.bias)

    def by_token(self, batch: int, width: int) -> WindowByToken:
        return WindowByToken(self.window, self.weight, self.bias, batch, width)

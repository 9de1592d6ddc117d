"""Causal networks over tokens: patches of an image, in raster order.

A token has E entries. What the networks say of a token depends only on the tokens before it, and
on the entries of the token itself that come before. Inside a network an image lies as rows of
tokens, `(B, H, W, C)`. Each network has two paths to the same numbers: all tokens at once, and
token by token, which computes each column of features once.
"""

import itertools
import math
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.ordinal import Prediction, TokenNet
from flowtrain.nets.convolution import relu_
from flowtrain.nets.masked import MaskedLinear


class CausalConv(nn.Linear):
    """A convolution of tokens before a token: `(B, H, W, C)` to `(B, H, W, C')`.

    It sees the tokens of the `above` rows above it, up to `beside` columns to each side, and the
    `beside` tokens to the left; with `itself` also the token. In raster order these are the first
    of the window. Its weight is a matrix `(C', taps * C)`, because Muon takes matrices.
    """

    def __init__(
        self, inputs: int, outputs: int, above: int, beside: int, itself: bool, bias: bool = True
    ):
        self.above, self.beside = above, beside
        self.window = (above + 1, 2 * beside + 1)
        self.taps = above * (2 * beside + 1) + beside + itself
        super().__init__(self.taps * inputs, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (self.taps, -1))
        weight = F.pad(weight, (0, 0, 0, math.prod(self.window) - self.taps))
        filters = weight.unflatten(1, self.window).movedim(-1, 1)
        rows = torch.cat([x.new_zeros(len(x), self.above, *x.shape[2:]), x], dim=1)
        y = F.conv2d(rows.movedim(-1, 1), filters, self.bias, padding=(0, self.beside))
        return y.movedim(1, -1)

    def windows(self, x: Tensor) -> Tensor:
        """What the convolution sees at each token, `(B, H, W, taps * C)`."""
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, self.beside, self.beside, self.above, 0))
        taps = itertools.islice(itertools.product(*map(range, self.window)), self.taps)
        return torch.cat([padded[:, i : i + height, j : j + width] for i, j in taps], dim=-1)


class _ConvByToken:
    """A `CausalConv` that computes one column `(C', B)` after the other.

    It keeps the rows of tokens that the window reaches, `(beside + W + beside, C, B)` each. What
    is to the right of the token at hand is never read.
    """

    def __init__(self, conv: CausalConv, batch: int, width: int):
        channels = conv.in_features // conv.taps
        taps = [conv.window[1]] * conv.above + [conv.taps - conv.above * conv.window[1]]
        weights = conv.weight.split([channels * n for n in taps], dim=1)
        self.parts = list(zip(weights, taps, strict=True))
        row = conv.weight.new_zeros(width + 2 * conv.beside, channels, batch)
        self.rows = deque(row.clone() for _ in taps)
        self.beside = conv.beside
        self.bias = conv.bias[:, None]

    def start(self, j: int) -> None:
        """Begins with a token in column j. In the first column a row begins."""
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


class LinearPrediction(Prediction):
    """The best linear prediction of an entry from a causal window and from its token's entries.

    `fit` solves it by least squares. Its weights are parameters of the data path, so they are
    trained, and computed in full precision.
    """

    def __init__(self, entries: int, size: tuple[int, int], above: int, beside: int):
        super().__init__()
        self.size = size
        self.window = CausalConv(entries, entries, above, beside, itself=False)
        self.within = nn.Parameter(torch.zeros(entries, entries))  # strictly lower triangular
        nn.init.zeros_(self.window.weight)
        nn.init.zeros_(self.window.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).contiguous()
        predicted: Tensor = self.window(rows) + F.linear(rows, self.within.tril(-1))
        return predicted.movedim(-1, 1)

    @torch.no_grad()
    def fit(self, x: Tensor, ridge: float = 1e-4) -> Tensor:
        """See `Prediction`.

        The Cholesky factor of the covariance of window and token has the predictions of all
        entries: its inverse turns the entries into residuals of variance 1.
        """
        entries, rows = x.shape[1], x.movedim(1, -1)
        seen = torch.cat([self.window.windows(rows), rows], dim=-1).flatten(0, 2).double()
        mean = seen.mean(dim=0)
        covariance = torch.cov(seen.T, correction=0)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
        whitening = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(len(mean), dtype=mean.dtype), upper=False
        )[-entries:]
        deviation: Tensor = 1 / whitening[:, -entries:].diagonal()
        weights = -whitening * deviation[:, None]
        weights[:, -entries:].diagonal().zero_()
        self.window.weight.copy_(weights[:, :-entries])
        self.within.copy_(weights[:, -entries:])
        self.window.bias.copy_(mean[-entries:] - weights @ mean)
        return deviation

    def by_token(self, values: Tensor) -> "_PredictionByToken":
        return _PredictionByToken(self, values)


class _PredictionByToken:
    """See `PredictionByToken`."""

    def __init__(self, prediction: LinearPrediction, values: Tensor):
        self.values = values
        self.window = _ConvByToken(prediction.window, values.shape[1], prediction.size[1])
        self.within = prediction.within.tril(-1)[:, None]

    def start(self, i: int, j: int) -> None:
        self.window.start(j)
        self.of_window = self.window.column(j)

    def mean(self, d: int) -> Tensor:
        return torch.addmm(self.of_window[d : d + 1], self.within[d], self.values)[0]

    def end(self, i: int, j: int) -> None:
        self.window.write(j, self.values)


class _Block(nn.Module):
    """A residual block: normalization, a causal convolution, ReLU, and 1x1 that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.conv = CausalConv(width, width, 1, 1, itself=True)
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
        self.conv = _ConvByToken(block.conv, batch, width)
        self.weight, self.bias = block.last.weight, block.last.bias[:, None]

    def column(self, x: Tensor, j: int) -> Tensor:
        self.conv.start(j)
        self.conv.write(j, _norm_of_columns(x))
        return torch.addmm(x, self.weight, self.conv.column(j).relu_()).add_(self.bias)


def _norm_of_columns(x: Tensor) -> Tensor:
    """Layer norm over the channels of `(C, B)`."""
    x = x - x.mean(dim=0)
    return x.mul_((x.square().mean(dim=0) + 1e-5).rsqrt_())


class TokenHead(nn.Module):
    """A masked network within a token (MADE, Germain et al. 2015), given features of its past.

    It maps three inputs of each entry (value, residual, linear prediction), `(..., 3E)`, and
    features `(..., C)` to `(..., P E)`. The parameters of an entry depend on its prediction, and on
    all inputs of the entries before it. Each entry has `units` hidden units in each of two layers.
    The features enter all three layers.
    """

    def __init__(self, entries: int, features: int, units: int, parameters: int):
        super().__init__()
        self.entries, self.units = entries, units
        entry = torch.arange(entries)
        unit, output = entry.repeat_interleave(units)[:, None], entry.repeat(parameters)[:, None]
        seen = torch.cat([(entry < unit).repeat(1, 2), entry <= unit], dim=1)
        self.first = _masked(seen, features)
        self.second = _masked(unit[:, 0] <= unit, features)
        self.last = _masked(unit[:, 0] <= output, features)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        h = relu_(self.first(torch.cat([x, features], dim=-1)))
        h = relu_(self.second(torch.cat([h, features], dim=-1)))
        parameters: Tensor = self.last(torch.cat([h, features], dim=-1))
        return parameters


class _HeadByEntry:
    """A `TokenHead` that computes one entry after the other, in rows `(., B)`."""

    def __init__(self, head: TokenHead, seen: Tensor):
        entries, units = head.entries, head.units
        self.seen = seen
        # The rows of the last layer are sorted by entry.
        order = torch.arange(len(head.last.weight)).view(-1, entries).T.flatten()
        layers = [head.first, head.second, head.last]
        weights = [layer.weight * layer.mask for layer in layers]
        weights[2] = weights[2][order]
        widths = [len(seen), entries * units, entries * units]
        self.outside = torch.cat([w[:, n:] for w, n in zip(weights, widths, strict=True)])
        bias = [head.first.bias, head.second.bias, head.last.bias[order]]
        self.bias = torch.cat(bias)[:, None]
        self.of_features = seen.new_empty(len(self.bias), seen.shape[1])
        of_layers = self.of_features.split([len(weight) for weight in weights])
        self.first, self.second = (torch.empty_like(of) for of in of_layers[:2])
        # Rows of weights, of what the features add, and of outputs, for each entry.
        self.rows = [
            [
                (weight[:, :n].chunk(entries)[d], of.chunk(entries)[d])
                for weight, n, of in zip(weights, widths, of_layers, strict=True)
            ]
            for d in range(entries)
        ]
        self.units = units

    def begin(self, features: Tensor) -> None:
        """Begins with a token that has these features, `(C, B)`."""
        torch.addmm(self.bias, self.outside, features, out=self.of_features)

    def parameters(self, d: int) -> Tensor:
        (w1, of_first), (w2, of_second), (w3, of_last) = self.rows[d]
        units, known = slice(d * self.units, (d + 1) * self.units), (d + 1) * self.units
        torch.addmm(of_first, w1, self.seen, out=self.first[units]).relu_()
        torch.addmm(of_second, w2[:, :known], self.first[:known], out=self.second[units]).relu_()
        return torch.addmm(of_last, w3[:, :known], self.second[:known])


def _masked(mask: Tensor, features: int) -> MaskedLinear:
    """A masked layer that also sees all features."""
    return MaskedLinear(torch.cat([mask, mask.new_ones(len(mask), features)], dim=1))


class CausalNet(TokenNet):
    """Causal convolutions over tokens, then a masked network within the token.

    It maps the values, the residuals and the linear predictions of the entries, `(B, 3E, H, W)`, to
    `(B, P E, H, W)`.
    """

    def __init__(
        self,
        entries: int,
        size: tuple[int, int],
        parameters: int,
        width: int,
        blocks: int,
        units: int,
        window: int,
    ):
        super().__init__()
        self.entries, self.size = entries, size
        self.first = CausalConv(2 * entries, width, window, window, itself=False)
        self.position = nn.Parameter(torch.zeros(*size, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = TokenHead(entries, width, units, parameters)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        rows = x.movedim(1, -1)
        h = self.first(rows[..., : 2 * self.entries])
        h = h + self.position.to(h.dtype)
        for block in self.blocks:
            h = block(h)
        parameters: Tensor = self.head(rows, F.layer_norm(h, h.shape[-1:]))
        return parameters.movedim(-1, 1)

    def by_token(self, seen: Tensor, context: Tensor | None = None) -> "_CausalNetByToken":
        return _CausalNetByToken(self, seen, context)


class _CausalNetByToken(_HeadByEntry):
    """See `NetByToken`. Each column of features is computed once."""

    def __init__(self, net: CausalNet, seen: Tensor, context: Tensor | None):
        super().__init__(net.head, seen)
        batch, width = seen.shape[1], net.size[1]
        self.position = net.position[..., None]
        self.conv = _ConvByToken(net.first, batch, width)
        blocks: list[_Block] = list(net.blocks)  # type: ignore[arg-type]
        self.blocks = [_BlockByToken(block, batch, width) for block in blocks]

    def start(self, i: int, j: int) -> None:
        self.conv.start(j)
        h = self.conv.column(j) + self.position[i, j]
        for block in self.blocks:
            h = block.column(h, j)
        self.begin(_norm_of_columns(h))

    def end(self, i: int, j: int) -> None:
        self.conv.write(j, self.seen[: 2 * len(self.seen) // 3])

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


class Window:
    """The tokens that a causal convolution sees at a token.

    These are the tokens of the `above` rows above it, up to `beside` columns to each side, and the
    `beside` tokens to the left; with `itself` also the token. In raster order they are the first
    `taps` of a rectangle.
    """

    def __init__(self, above: int, beside: int, itself: bool):
        self.above, self.beside = above, beside
        self.rectangle = (above + 1, 2 * beside + 1)
        self.taps = above * (2 * beside + 1) + beside + itself

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Rows of tokens `(B, H, W, C)` and a weight `(C', taps * C)` to `(B, H, W, C')`."""
        weight = weight.unflatten(1, (self.taps, -1))
        weight = F.pad(weight, (0, 0, 0, math.prod(self.rectangle) - self.taps))
        filters = weight.unflatten(1, self.rectangle).movedim(-1, 1)
        rows = torch.cat([x.new_zeros(len(x), self.above, *x.shape[2:]), x], dim=1)
        y = F.conv2d(rows.movedim(-1, 1), filters, bias, padding=(0, self.beside))
        return y.movedim(1, -1)

    def seen(self, x: Tensor) -> Tensor:
        """What the convolution sees at each token, `(B, H, W, taps * C)`."""
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, self.beside, self.beside, self.above, 0))
        taps = itertools.islice(itertools.product(*map(range, self.rectangle)), self.taps)
        return torch.cat([padded[:, i : i + height, j : j + width] for i, j in taps], dim=-1)


class _WindowByToken:
    """A convolution of a `Window` that computes one column `(C', B)` after the other.

    It keeps the rows of tokens that the window reaches, `(beside + W + beside, C, B)` each. What
    is to the right of the token at hand is never read.
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


class CausalConv(nn.Linear):
    """A convolution of the tokens in a window: `(B, H, W, C)` to `(B, H, W, C')`.

    Its weight is a matrix `(C', taps * C)`, because Muon takes matrices.
    """

    def __init__(self, inputs: int, outputs: int, window: Window):
        super().__init__(window.taps * inputs, outputs)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return self.window.convolve(x, self.weight, self.bias)

    def by_token(self, batch: int, width: int) -> _WindowByToken:
        return _WindowByToken(self.window, self.weight, self.bias, batch, width)


class LinearPrediction(Prediction):
    """The best linear prediction of an entry from a causal window and from its token's entries.

    `fit` solves it by least squares. Its weights are parameters of the data path: they are computed
    in full precision, and trained. They are stored in units of `UNIT`, so that the steps of Adam
    are so much smaller: steps that suit a network would spoil the solution.
    """

    UNIT = 0.01

    def __init__(self, entries: int, size: tuple[int, int], window: Window):
        super().__init__()
        self.size = size
        self.window = window
        self.of_window = nn.Parameter(torch.zeros(entries, window.taps * entries))
        self.within = nn.Parameter(torch.zeros(entries, entries))  # strictly lower triangular
        self.bias = nn.Parameter(torch.zeros(entries))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of the window, those within the token, and the bias."""
        return self.of_window * self.UNIT, self.within.tril(-1) * self.UNIT, self.bias * self.UNIT

    def forward(self, x: Tensor) -> Tensor:
        of_window, within, bias = self.weights()
        rows = x.movedim(1, -1).contiguous()
        predicted = self.window.convolve(rows, of_window, bias) + F.linear(rows, within)
        return predicted.movedim(-1, 1)

    @torch.no_grad()
    def fit(self, x: Tensor, ridge: float = 1e-4) -> Tensor:
        """See `Prediction`.

        The Cholesky factor of the covariance of window and token has the predictions of all
        entries: its inverse turns the entries into residuals of variance 1.
        """
        entries, count = x.shape[1], x[:, 0].numel()
        size = (self.window.taps + 1) * entries
        mean = torch.zeros(size, dtype=torch.float64)
        covariance = torch.zeros(size, size, dtype=torch.float64)
        # One image at a time, because the windows of all would not fit into memory.
        for rows in x.movedim(1, -1).cpu().double().split(1):
            seen = torch.cat([self.window.seen(rows), rows], dim=-1).flatten(0, 2)
            mean += seen.sum(dim=0) / count
            covariance += seen.T @ seen / count
        covariance -= mean.outer(mean)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
        whitening = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(size, dtype=mean.dtype), upper=False
        )[-entries:]
        deviation: Tensor = 1 / whitening[:, -entries:].diagonal()
        weights = -whitening * deviation[:, None]
        weights[:, -entries:].diagonal().zero_()
        self.of_window.copy_(weights[:, :-entries] / self.UNIT)
        self.within.copy_(weights[:, -entries:] / self.UNIT)
        self.bias.copy_((mean[-entries:] - weights @ mean) / self.UNIT)
        return deviation

    def by_token(self, values: Tensor) -> "_PredictionByToken":
        return _PredictionByToken(self, values)


class _PredictionByToken:
    """See `PredictionByToken`."""

    def __init__(self, prediction: LinearPrediction, values: Tensor):
        self.values = values
        weight, within, bias = prediction.weights()
        size = values.shape[1], prediction.size[1]
        self.window = _WindowByToken(prediction.window, weight, bias, *size)
        self.within = within[:, None]

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


class TokenHead(nn.Module):
    """A masked network within a token (MADE, Germain et al. 2015), given features of its past.

    It maps three inputs of each entry (value, residual, linear prediction), `(..., 3E)`, and
    features `(..., C)` to `(..., P E)`. The parameters of an entry depend on its prediction, and on
    all inputs of the entries before it. Each entry has `units` hidden units in each of two layers.
    The features enter all three layers. At first the parameters of every entry are `start`, `(P,)`.
    """

    def __init__(self, entries: int, features: int, units: int, start: Tensor):
        super().__init__()
        self.entries, self.units = entries, units
        entry = torch.arange(entries)
        unit = entry.repeat_interleave(units)[:, None]
        output = entry.repeat(len(start))[:, None]
        seen = torch.cat([(entry < unit).repeat(1, 2), entry <= unit], dim=1)
        self.first = _masked(seen, features)
        self.second = _masked(unit[:, 0] <= unit, features)
        self.last = _masked(unit[:, 0] <= output, features)
        nn.init.zeros_(self.last.weight)
        self.last.bias = nn.Parameter(start.repeat_interleave(entries))

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


class _CausalNetByToken(_HeadByEntry):
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

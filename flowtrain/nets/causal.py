"""Causal networks over tokens: patches of an image, in raster order.

A token has E entries. What the networks say of a token depends only on the tokens before it, and
on the entries of the token itself that come before. Inside a network an image lies as rows of
tokens, `(B, H, W, C)`. Each network has two paths to the same numbers: all tokens at once, and
token by token, which computes each column of features once.
"""

import itertools
import math

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

    def canvas(self, like: Tensor, batch: int, size: tuple[int, int], channels: int) -> Tensor:
        """Zeros for `seen_at`, of the kind of `like`: all tokens, with the margins of the window.

        The shape is `(B, above + H, beside + W + beside, C)`.
        """
        height, width = size
        return like.new_zeros(batch, height + self.above, width + 2 * self.beside, channels)

    def seen_at(self, canvas: Tensor, i: int, j: int) -> Tensor:
        """What the convolution sees at token `(i, j)`, `(B, taps * C)`."""
        rectangle = canvas[:, i : i + self.above + 1, j : j + self.rectangle[1]]
        return rectangle.flatten(1, 2)[:, : self.taps].flatten(1)

    def write(self, canvas: Tensor, i: int, j: int, column: Tensor) -> None:
        """Puts the features `(B, C)` of token `(i, j)` on the canvas."""
        canvas[:, i + self.above, j + self.beside] = column


class CausalConv(nn.Linear):
    """A convolution of the tokens in a window: `(B, H, W, C)` to `(B, H, W, C')`.

    Its weight is a matrix `(C', taps * C)`, because Muon takes matrices.
    """

    def __init__(self, inputs: int, outputs: int, window: Window):
        super().__init__(window.taps * inputs, outputs)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return self.window.convolve(x, self.weight, self.bias)

    def canvas(self, batch: int, size: tuple[int, int]) -> Tensor:
        """See `Window`."""
        channels = self.in_features // self.window.taps
        return self.window.canvas(self.weight, batch, size, channels)

    def column(self, canvas: Tensor, i: int, j: int) -> Tensor:
        """The output at token `(i, j)`, `(B, C')`, from a canvas of the tokens seen there."""
        column: Tensor = F.linear(self.window.seen_at(canvas, i, j), self.weight, self.bias)
        return column


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
        entries, rows = x.shape[1], x.movedim(1, -1)
        seen = torch.cat([self.window.seen(rows), rows], dim=-1).flatten(0, 2).double()
        mean = seen.mean(dim=0)
        covariance = torch.cov(seen.T, correction=0)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
        whitening = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(len(mean), dtype=mean.dtype), upper=False
        )[-entries:]
        deviation: Tensor = 1 / whitening[:, -entries:].diagonal()
        weights = -whitening * deviation[:, None]
        weights[:, -entries:].diagonal().zero_()
        self.of_window.copy_(weights[:, :-entries] / self.UNIT)
        self.within.copy_(weights[:, -entries:] / self.UNIT)
        self.bias.copy_((mean[-entries:] - weights @ mean) / self.UNIT)
        return deviation

    def by_token(self, batch: int) -> "_PredictionByToken":
        return _PredictionByToken(self, batch)


class _PredictionByToken:
    """See `PredictionByToken`."""

    def __init__(self, prediction: LinearPrediction, batch: int):
        self.window = prediction.window
        self.weight, self.within, self.bias = prediction.weights()
        self.canvas = self.window.canvas(self.weight, batch, prediction.size, len(self.weight))

    def start(self, i: int, j: int) -> None:
        self.of_window = F.linear(self.window.seen_at(self.canvas, i, j), self.weight, self.bias)

    def mean(self, d: int, values: Tensor) -> Tensor:
        return self.of_window[:, d] + values @ self.within[d]

    def end(self, i: int, j: int, values: Tensor) -> None:
        self.window.write(self.canvas, i, j, values)


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

    def column(self, x: Tensor, canvas: Tensor, i: int, j: int) -> Tensor:
        self.conv.window.write(canvas, i, j, self.norm(x))
        y: Tensor = x + self.last(self.conv.column(canvas, i, j).relu())
        return y


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
    """A `TokenHead` that computes one entry after the other."""

    def __init__(self, head: TokenHead):
        self.entries = head.entries
        layers = [head.first, head.second, head.last]
        widths = [3 * head.entries, *[head.entries * head.units] * 2]
        weights = [layer.weight * layer.mask for layer in layers]
        self.within = [weight[:, :n] for weight, n in zip(weights, widths, strict=True)]
        self.outside = torch.cat([w[:, n:] for w, n in zip(weights, widths, strict=True)])
        self.bias = torch.cat([layer.bias for layer in layers])
        self.units = head.units
        self.rows = [len(weight) for weight in weights]

    def begin(self, features: Tensor) -> None:
        """Begins with a token that has these features, `(B, C)`."""
        outside = F.linear(features, self.outside, self.bias).split(self.rows, dim=1)
        self.of_first, self.of_second, of_last = outside
        self.of_last = of_last.unflatten(1, (-1, self.entries))
        new = features.new_zeros
        self.inputs = new(len(features), self.within[0].shape[1])
        self.first = new(len(features), self.rows[0])
        self.second = new(len(features), self.rows[1])

    def parameters(self, d: int, predicted: Tensor) -> Tensor:
        """The parameters `(B, P)` of entry d, from its prediction `(B,)`."""
        self.inputs[:, 2 * self.entries + d] = predicted
        units = slice(d * self.units, (d + 1) * self.units)
        w1, w2, w3 = self.within
        self.first[:, units] = torch.addmm(
            self.of_first[:, units], self.inputs, w1[units].T
        ).relu_()
        self.second[:, units] = torch.addmm(
            self.of_second[:, units], self.first, w2[units].T
        ).relu_()
        return torch.addmm(self.of_last[..., d], self.second, w3[d :: self.entries].T)

    def known(self, d: int, value: Tensor, residual: Tensor) -> None:
        """Takes the value and the residual of entry d, both `(B,)`."""
        self.inputs[:, d], self.inputs[:, self.entries + d] = value, residual


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
        start: Tensor,
        width: int,
        blocks: int,
        units: int,
        window: Window,
    ):
        super().__init__()
        self.entries, self.size = entries, size
        self.first = CausalConv(2 * entries, width, window)
        self.position = nn.Parameter(torch.zeros(*size, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = TokenHead(entries, width, units, start)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        rows = x.movedim(1, -1)
        h = self.first(rows[..., : 2 * self.entries])
        h = h + self.position.to(h.dtype)
        for block in self.blocks:
            h = block(h)
        parameters: Tensor = self.head(rows, F.layer_norm(h, h.shape[-1:]))
        return parameters.movedim(-1, 1)

    def by_token(self, batch: int, context: Tensor | None = None) -> "_CausalNetByToken":
        return _CausalNetByToken(self, batch, context)


class _CausalNetByToken(_HeadByEntry):
    """See `NetByToken`. Each column of features is computed once."""

    def __init__(self, net: CausalNet, batch: int, context: Tensor | None):
        super().__init__(net.head)
        self.net = net
        self.canvas = net.first.canvas(batch, net.size)
        blocks: list[_Block] = list(net.blocks)  # type: ignore[arg-type]
        self.blocks = [(block, block.conv.canvas(batch, net.size)) for block in blocks]

    def start(self, i: int, j: int) -> None:
        h = self.net.first.column(self.canvas, i, j) + self.net.position[i, j]
        for block, canvas in self.blocks:
            h = block.column(h, canvas, i, j)
        self.begin(F.layer_norm(h, h.shape[-1:]))

    def end(self, i: int, j: int, values: Tensor, residuals: Tensor) -> None:
        self.net.first.window.write(self.canvas, i, j, torch.cat([values, residuals], dim=1))

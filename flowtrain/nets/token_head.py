"""The network within a token: all of its entries at once, or one after the other."""

import torch
from torch import Tensor, nn

from flowtrain.nets.convolution import relu_
from flowtrain.nets.masked import MaskedLinear


class TokenHead(nn.Module):
    """A masked network within a token (MADE, Germain et al. 2015), given features of its past.

    It maps three inputs of each entry (value, residual, linear prediction), `(..., 3E)`, and
    features `(..., C)`, which enter all three layers, to `(..., P E)`. The parameters of an entry
    depend on its prediction, and on all inputs of earlier entries. Each entry has `units` hidden
    units in each of two layers. The parameters of every entry start as `start`, `(P,)`.
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


class HeadByEntry:
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
        # For each entry, rows of weights, and of the features' part of the outputs, by layer.
        self.rows = [
            [
                (weight[:, :n].chunk(entries)[d], of.chunk(entries)[d])
                for weight, n, of in zip(weights, widths, of_layers, strict=True)
            ]
            for d in range(entries)
        ]
        self.units = units

    def begin(self, features: Tensor) -> None:
        """Begins with a token of features `(C, B)`."""
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

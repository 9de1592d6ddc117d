"""The network within a token: all of its entries at once, or one after the other."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        h = relu_(_layer(self.first, x, features))
        h = relu_(_layer(self.second, h, features))
        return _layer(self.last, h, features, tokens_last=True)


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


def _layer(layer: MaskedLinear, x: Tensor, features: Tensor, tokens_last: bool = False) -> Tensor:
    """`layer(cat([x, features]))`: `(..., N)` and `(..., C)` to `(..., N')`.

    With `tokens_last`, all tokens of an entry are contiguous, as the mixtures take them.
    """
    dtype = x.dtype  # of autocast, which does not reach into a function of autograd
    weight, bias = (layer.weight * layer.mask).to(dtype), layer.bias.to(dtype)
    y: Tensor = _Layer.apply(x, features, weight, bias, tokens_last)
    return y


class _Layer(torch.autograd.Function):
    """A linear layer of two inputs, `(..., N)` and `(..., C)`, without a copy to join them.

    On a CPU, copies of inputs and gradients take a sixth of the time of a head.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, tokens_last: bool
    ) -> Tensor:
        parts = [each.contiguous() for each in weight.tensor_split([x.shape[-1]], dim=1)]
        rows = x.flatten(0, -2), features.flatten(0, -2)
        ctx.save_for_backward(*rows, *parts)
        ctx.tokens_last = tokens_last
        shape = x.shape[:-1]
        if tokens_last:
            y = x.new_empty(len(weight), *shape)
            out = y.flatten(1)
            torch.addmm(bias[:, None], parts[1], rows[1].T, out=out)
            torch.addmm(out, parts[0], rows[0].T, out=out)
            return y.movedim(0, -1)
        y = x.new_empty(*shape, len(weight))
        out = y.flatten(0, -2)
        torch.addmm(bias, rows[1], parts[1].T, out=out)
        torch.addmm(out, rows[0], parts[0].T, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rows, of_x, of_features = ctx.saved_tensors
        shape = grad.shape[:-1]
        turned = grad.movedim(-1, 0).flatten(1) if ctx.tokens_last else grad.flatten(0, -2).T
        grad_x = (turned.T @ of_x).view(*shape, -1) if ctx.needs_input_grad[0] else None
        grad_features = (turned.T @ of_features).view(*shape, -1)
        grad_weight = torch.cat([turned @ each for each in rows], dim=1)
        return grad_x, grad_features, grad_weight, turned.sum(dim=1), None

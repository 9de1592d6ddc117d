"""Masked conditioners: each output sees the entries before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.autoregressive import AutoregressiveNet
from flowtrain.nets.convolution import relu_


class MaskedLinear(nn.Linear):
    """A linear layer without the weights where `mask`, `(D', D)`, is False: `(B, D)` to `(B, D')`.

    Initialized like torch's, but each row by the number of inputs that it sees.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        # a function of the sizes alone
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        with torch.no_grad():
            seen = self.mask.sum(dim=1, keepdim=True).clamp(min=1)
            self.weight.mul_((self.in_features / seen).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedDenseNet(AutoregressiveNet):
    """MADE (Germain et al. 2015, section 3): `(B, D)` to `(B, P D)`, P parameters for each entry
    from those before it.

    ReLU layers of one width, then a masked layer that starts at zero. The degree of a hidden unit,
    the number of entries that it sees (the first ones), goes evenly from 1 to D - 1; the units are
    sorted by it, so that what an entry depends on is the beginning of every layer. With a context,
    `(B, C', H, W)` or `(B, E)`, of which the first layer sees all `context_features`, there are
    units that see no entry. Raises `ValueError` where it is missing.

    Args:
        dims: D.
        parameters_per_entry: P; the outputs are one parameter of all entries after the other, as
            `Transform` has them.
        width: units of a hidden layer.
        hidden_layers: their number, at least 1.
        context_features: entries of a context, 0 for none.
    """

    def __init__(
        self,
        dims: int,
        parameters_per_entry: int,
        width: int,
        hidden_layers: int,
        context_features: int = 0,
    ):
        super().__init__()
        lowest = 0 if context_features else min(1, dims - 1)
        # The last units see all entries but one, however few units there are.
        degrees = [dims - 1 - i * (dims - lowest) // width for i in reversed(range(width))]
        self.units = [degrees.count(d) for d in range(dims)]  # of each degree
        degree, entry = torch.tensor(degrees), torch.arange(dims)
        masks = [entry < degree[:, None]] + [degree <= degree[:, None]] * (hidden_layers - 1)
        self.hidden = nn.ModuleList(map(MaskedLinear, masks))
        self.last = MaskedLinear((degree <= entry[:, None]).repeat(parameters_per_entry, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_features, width, bias=False) if context_features else None

    def _outside(self, context: Tensor | None) -> Tensor:
        """What the first layer sees of the context, `(B, width)`; without one, zeros `(1,
        width)`.
        """
        if self.context is None:
            return self.last.weight.new_zeros(1, self.last.in_features)
        if context is None:
            raise ValueError(f"expected a context of {self.context.in_features} entries")
        return self.context(context.flatten(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = relu_(first(x) + self._outside(context))
        for layer in others:
            h = relu_(layer(h))
        return self.last(h)

    def entry_by_entry(
        self, next_entry: Callable[[Tensor], Tensor], batch: int, context: Tensor | None = None
    ) -> Tensor:
        """The `x` `(B, D)` of which each entry is `next_entry` of its parameters, `(B, P)` to `(B,
        1)`, in order.

        Each hidden unit is computed once. Units and entries are rows here, so that those known are
        contiguous.
        """
        layers: list[MaskedLinear] = list(self.hidden)  # type: ignore[arg-type]
        # Of the units of each degree, and of each entry: their rows of every layer.
        weights = [layer.weight.split(self.units) for layer in layers]
        biases = [layer.bias[:, None].split(self.units) for layer in layers]
        biases[0] = (layers[0].bias[:, None] + self._outside(context).T).split(self.units)
        last_weights = self.last.weight.unflatten(0, (-1, len(self.units))).unbind(1)
        last_biases = self.last.bias.unflatten(0, (-1, len(self.units), 1)).unbind(1)
        x = self.last.weight.new_empty(0, batch)
        hidden = [x] * len(layers)  # the units known so far
        for d, units in enumerate(self.units):
            below = x
            for i in range(len(layers) if units else 0):
                new = torch.addmm(biases[i][d], weights[i][d][:, : len(below)], below).relu()
                hidden[i] = below = torch.cat([hidden[i], new])
            parameters = torch.addmm(
                last_biases[d], last_weights[d][:, : len(hidden[-1])], hidden[-1]
            )
            x = torch.cat([x, next_entry(parameters.T).T])
        return x.T

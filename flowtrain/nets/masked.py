"""Masked conditioners, in which the parameters of an entry depend only on the entries before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.autoregressive import AutoregressiveNet
from flowtrain.nets.convolution import relu_


class MaskedLinear(nn.Linear):
    """A linear layer, `(B, D)` to `(B, D')`, without the weights where `mask` `(D', D)` is False.

    It starts like torch's, with each row scaled for the inputs that it sees.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        # Not saved, because it follows from the sizes.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        with torch.no_grad():
            seen = self.mask.sum(dim=1, keepdim=True).clamp(min=1)
            self.weight.mul_((self.in_features / seen).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedDenseNet(AutoregressiveNet):
    """MADE (Germain et al. 2015, section 3): `(B, D)` to `(B, P D)`, P parameters per entry.

    One or more ReLU layers of one width, then a masked layer that starts at zero. The degree of a
    hidden unit is the number of entries that it sees, always the first ones. Degrees go evenly from
    1 to D - 1. Units are sorted by degree, so an entry depends on the beginning of each layer.

    The first layer sees all `context_features` entries of a context, `(B, C', H, W)` or `(B, E)`.
    With a context, degrees start at 0. Raises `ValueError` if the context is missing.
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
        # The last unit sees all entries but one, however few units there are.
        degrees = [dims - 1 - i * (dims - lowest) // width for i in reversed(range(width))]
        self.units = [degrees.count(d) for d in range(dims)]  # number of units per degree
        degree, entry = torch.tensor(degrees), torch.arange(dims)
        masks = [entry < degree[:, None]] + [degree <= degree[:, None]] * (hidden_layers - 1)
        self.hidden = nn.ModuleList(map(MaskedLinear, masks))
        self.last = MaskedLinear((degree <= entry[:, None]).repeat(parameters_per_entry, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context_features, width, bias=False) if context_features else None

    def _outside(self, context: Tensor | None) -> Tensor:
        """The context's part of the first layer, `(B, width)`; without one, zeros `(1, width)`."""
        if self.context is None:
            return self.last.weight.new_zeros(1, self.last.in_features)
        if context is None:
            raise ValueError(f"expected a context of {self.context.in_features} entries")
        outside: Tensor = self.context(context.flatten(1))
        return outside

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = relu_(first(x) + self._outside(context))
        for layer in others:
            h = relu_(layer(h))
        parameters: Tensor = self.last(h)
        return parameters

    def entry_by_entry(
        self, next_entry: Callable[[Tensor], Tensor], batch: int, context: Tensor | None = None
    ) -> Tensor:
        """See `AutoregressiveNet`. Units and entries are rows: the known ones are contiguous."""
        layers: list[MaskedLinear] = list(self.hidden)  # type: ignore[arg-type]
        # The rows of each layer, divided by degree, and rows of the last layer by entry.
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

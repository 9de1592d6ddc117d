"""ActNorm and the 1x1 convolution after it, computed as one product.

The result is that of the two layers one after the other, in a fifth of the operations. On the data
path between couplings, most of an operation's time is its fixed cost. The matrices of all pairs of
one size are built together.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT, ActNorm
from flowtrain.bijections.base import Bijection, bounded, stacked
from flowtrain.bijections.conv1x1 import LinearChannels, mix_channels
from flowtrain.bijections.precision import full_precision


def fuse(layers: Sequence[Bijection]) -> list[Bijection]:
    """`layers`, with each ActNorm and the 1x1 convolution after it replaced by their product.

    The result serves one call only, because it holds matrices instead of parameters.
    """
    result: list[Bijection] = []
    kinds: dict[tuple[type, torch.Size], _Products] = {}
    for layer in layers:
        before = result[-1] if result else None
        if (
            isinstance(layer, LinearChannels)
            and isinstance(before, ActNorm)
            and before.shift.shape[1:] == (1, 1)
        ):
            before.require_initialized()
            layer.require_initialized()
            products = kinds.setdefault((type(layer), before.shift.shape), _Products())
            result[-1] = products.add(before, layer)
        else:
            result.append(layer)
    return result


class _Products:
    """The matrices of all pairs of one kind and size, computed when the first is used."""

    def __init__(self) -> None:
        self.actnorms: list[ActNorm] = []
        self.linears: list[LinearChannels] = []

    def add(self, actnorm: ActNorm, linear: LinearChannels) -> "FusedLinear":
        self.actnorms.append(actnorm)
        self.linears.append(linear)
        return FusedLinear(self, len(self.linears) - 1)

    @cached_property
    def _actnorm(self) -> tuple[Tensor, Tensor]:
        """Log-scales and shifts, `(K, C)`."""
        log_scale = bounded(stacked(self.actnorms, "log_scale"), LOG_SCALE_LIMIT)
        return log_scale.flatten(1), stacked(self.actnorms, "shift").flatten(1)

    @cached_property
    def forward_parts(self) -> tuple[tuple[Tensor, ...], ...]:
        """For each pair: `W diag(s)`, `W b` and the log-determinant per pixel, in nats."""
        log_scale, shift = self._actnorm
        kind = type(self.linears[0])
        with full_precision(shift):
            weight = kind.weights(self.linears)
            bias = (weight @ shift[:, :, None])[:, :, 0]
            log_det = kind.log_abs_dets(self.linears) + log_scale.sum(dim=1)
            return (weight * log_scale.exp()[:, None, :]).unbind(), bias.unbind(), log_det.unbind()

    @cached_property
    def inverse_parts(self) -> tuple[tuple[Tensor, ...], ...]:
        """The same for the inverses: `x = diag(1/s) W^-1 z - b / s`."""
        log_scale, shift = self._actnorm
        kind = type(self.linears[0])
        with full_precision(shift):
            scale = (-log_scale).exp()
            weight = kind.inverse_weights(self.linears) * scale[:, :, None]
            log_det = -kind.log_abs_dets(self.linears) - log_scale.sum(dim=1)
            return weight.unbind(), (-shift * scale).unbind(), log_det.unbind()


class FusedLinear(Bijection):
    """`z = W (x * s + b)` at every pixel; see `fuse`."""

    def __init__(self, products: _Products, index: int):
        super().__init__()
        self.products = products
        self.index = index

    def tensors(self) -> list[Tensor]:
        return [part[self.index] for part in self.products.forward_parts]

    def _apply_channels(
        self, x: Tensor, parts: tuple[tuple[Tensor, ...], ...]
    ) -> tuple[Tensor, Tensor]:
        weight, bias, log_det = (part[self.index] for part in parts)
        with full_precision(x):
            return mix_channels(x, weight, bias), (log_det * x[0, 0].numel()).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_channels(x, self.products.forward_parts)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_channels(z, self.products.inverse_parts)

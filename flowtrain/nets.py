"""Conditioner networks: from the kept part of a coupling (and context) to the parameters of its transform.

Every last layer starts at zero, so that every coupling starts as the identity (Glow, section 3.3). Called as
`net(kept, context)`; under autocast these networks, and nothing else, run in low precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowtrain.bijections.actnorm import ActNorm
from flowtrain.precision import conditioner_input


class Conv2d(nn.Linear):
    """A convolution of odd size `k` that keeps the image's, `(B, C, H, W)` to `(B, C', H, W)`.

    Its weight is a matrix, `(C', k * k * C / groups)`: what Muon takes, and as filters the order in memory that goes
    with the activations of conditioners (channels last).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True, groups: int = 1):
        super().__init__(kernel_size**2 * in_channels // groups, out_channels, bias)
        self.kernel_size = kernel_size
        self.groups = groups

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filters = weight.unflatten(1, (self.kernel_size, self.kernel_size, -1)).movedim(-1, 1)
        return F.conv2d(x, filters, bias, padding=self.kernel_size // 2, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)


class ZeroConv2d(Conv2d):
    """A convolution that starts at zero, with a learned gain of each output channel: `exp(3 * log_gain)`.

    As in the Glow release: the gain lets the outputs grow faster than the rate of Adam's steps would.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = (3 * self.log_gain).exp()
        # On the weights, which are smaller than the activations.
        return self._convolve(x, self.weight * gain[:, None], self.bias * gain)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def matrices(module: nn.Module) -> list[Tensor]:
    """The weights of all conditioners, without depthwise filters, which are vectors side by side."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [layer.weight for layer in layers if getattr(layer, "groups", 1) == 1]


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """`x` for a conditioner, with the context's channels, averaged down to the size of `x` where it is larger."""
    x = conditioner_input(x)
    if context is None:
        return x
    context = conditioner_input(context)
    if context.shape[-2:] != x.shape[-2:]:
        context = F.adaptive_avg_pool2d(context, (x.shape[-2], x.shape[-1]))
    return torch.cat([x, context], dim=1)


class _IntegerReLU(torch.autograd.Function):
    """ReLU of bfloat16, in place, on its bits as 16-bit integers: three times as fast on a CPU, forward and backward.

    As integers the numbers >= 0 are >= 0, minus infinity is -128, everything negative is below that or equal, and what
    lies between is NaN with a sign: it stays NaN, as it must (a ReLU fused into oneDNN's convolution would hide it).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        torch.threshold_(x.view(torch.int16), -128, 0)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        passed = torch.ops.aten.threshold_backward(grad.view(torch.int16), y.view(torch.int16), 0)
        return passed.view(torch.bfloat16)


def relu_(x: Tensor) -> Tensor:
    """ReLU in place."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return _IntegerReLU.apply(x)
    return F.relu_(x)


class ReLU(nn.Module):
    """ReLU in place, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_(x)


class GlowNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - zero 3x3 (Glow, section 3.3 and appendix B): `(B, C, H, W)` to `(B, C', H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, width: int, context_channels: int = 0):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2d(in_channels + context_channels, width, 3),
            ReLU(),
            Conv2d(width, width, 1),
            ReLU(),
            ZeroConv2d(width, out_channels, 3),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(with_context(x, context))


class ZeroNet(nn.Module):
    """One zero convolution: Glow's learned prior of a factored-out half (the release's `split2d_prior`)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layer = ZeroConv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer(conditioner_input(x))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalization and ReLU (He et al. 2016, "identity mappings")."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = ActNorm((width, 1, 1)), ActNorm((width, 1, 1))
        self.conv1 = Conv2d(width, width, 3, bias=False)
        self.conv2 = Conv2d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(relu_(self.norm1(x)[0]))
        return x + self.conv2(relu_(self.norm2(h)[0]))


class ResidualNet(nn.Module):
    """The residual conditioner of RealNVP (section 3.7): 3x3, `blocks` residual blocks, zero 1x1.

    ActNorm stands where the paper has batch normalization, so that an example does not see its batch mates.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int, context_channels: int = 0):
        super().__init__()
        self.first = Conv2d(in_channels + context_channels, width, 3)
        self.blocks = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.norm = ActNorm((width, 1, 1))
        self.last = ZeroConv2d(width, out_channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.blocks(self.first(with_context(x, context)))
        return self.last(relu_(self.norm(h)[0]))


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each pixel, `(B, C, H, W)` (as in Flow++, Ho et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Residual(nn.Sequential):
    """`x +` the layers of `x`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _BlockNet(nn.Module):
    """A convolution, residual blocks, ReLU, a convolution that starts at zero: `(B, C, H, W)` to `(B, C', H, W)`."""

    kernel_size: int  # of the first convolution and the last

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int, context_channels: int = 0):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2d(in_channels + context_channels, width, self.kernel_size),
            *(_Residual(*self._block(width)) for _ in range(blocks)),
            ReLU(),
            ZeroConv2d(width, out_channels, self.kernel_size),
        )

    def _block(self, width: int) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(with_context(x, context))


class GatedNet(_BlockNet):
    """Residual blocks `a * sigmoid(b)`, `a` and `b` from normalization, 3x3, ReLU, 1x1, as in Flow++ (section 3.3).

    With ReLU where it has a concatenated ELU, normalization at the entrance of a block, and no attention.
    """

    kernel_size = 3

    def _block(self, width: int) -> list[nn.Module]:
        return [ChannelNorm(width), Conv2d(width, width, 3), ReLU(), Conv2d(width, 2 * width, 1), nn.GLU(dim=1)]


class DepthwiseNet(_BlockNet):
    """Residual blocks of a depthwise-separable convolution (Chollet 2017): depthwise 3x3, normalization, ReLU, 1x1."""

    kernel_size = 1

    def _block(self, width: int) -> list[nn.Module]:
        return [Conv2d(width, width, 3, groups=width), ChannelNorm(width), ReLU(), Conv2d(width, width, 1)]


class DenseNet(nn.Module):
    """ReLU layers of one width, then a zero linear layer (NICE, section 5.1): `(B, D)` to `(B, D')`."""

    def __init__(self, in_features: int, out_features: int, width: int, hidden_layers: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(hidden_layers):
            layers += [nn.Linear(in_features if i == 0 else width, width), ReLU()]
        self.layers = nn.Sequential(*layers, ZeroLinear(width, out_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x)


class MaskedLinear(nn.Linear):
    """A linear layer without the weights where `mask`, `(D', D)`, is False: `(B, D)` to `(B, D')`.

    Initialized like torch's, but each row by the number of inputs that it sees.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)  # a function of the sizes alone
        with torch.no_grad():
            seen = self.mask.sum(dim=1, keepdim=True).clamp(min=1)
            self.weight.mul_((self.in_features / seen).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedDenseNet(nn.Module):
    """MADE (Germain et al. 2015, section 3): `(B, D)` to `(B, P D)`, P parameters for each entry from those before it.

    ReLU layers of one width, then a masked layer that starts at zero. The degree of a hidden unit, the number of
    entries that it sees (the first ones), goes evenly from 1 to D - 1; the units are sorted by it, so that what an
    entry depends on is the beginning of every layer. With a context, `(B, C', H, W)` or `(B, E)`, of which the first
    layer sees all `context_features`, there are units that see no entry. Raises `ValueError` where it is missing.

    Args:
        dims: D.
        parameters_per_entry: P; the outputs are one parameter of all entries after the other, as `Transform` has them.
        width: units of a hidden layer.
        hidden_layers: their number, at least 1.
        context_features: entries of a context, 0 for none.
    """

    def __init__(self, dims: int, parameters_per_entry: int, width: int, hidden_layers: int, context_features: int = 0):
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
        """What the first layer sees of the context, `(B, width)`; without one, zeros `(1, width)`."""
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
        """The `x` `(B, D)` of which each entry is `next_entry` of its parameters, `(B, P)` to `(B, 1)`, in order.

        Each hidden unit is computed once. Units and entries are rows here, so that those known are contiguous.
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
            parameters = torch.addmm(last_biases[d], last_weights[d][:, : len(hidden[-1])], hidden[-1])
            x = torch.cat([x, next_entry(parameters.T).T])
        return x.T

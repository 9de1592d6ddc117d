"""Conditioner networks: from the kept part of a coupling (and context) to the parameters of its transform.

Every last layer starts at zero, so that every coupling starts as the identity (Glow, section 3.3). Called as
`net(kept, context)`; under autocast these networks, and nothing else, run in low precision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.actnorm import ActNorm


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero, with a learned gain of each output channel: `exp(3 * log_gain)`.

    As in the Glow release: the gain lets the outputs grow faster than the rate of Adam's steps would.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = (3 * self.log_gain).exp()
        assert self.bias is not None
        # On the weights, which are smaller than the activations.
        return F.conv2d(x, self.weight * gain[:, None, None, None], self.bias * gain, padding=self.padding)


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """Appends the context's channels, averaged down to the size of `x` where it is larger."""
    if context is None:
        return x
    return torch.cat([x, F.adaptive_avg_pool2d(context, (x.shape[-2], x.shape[-1]))], dim=1)


class GlowNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - zero 3x3 (Glow, section 3.3 and appendix B): `(B, C, H, W)` to `(B, C', H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, width: int, context_channels: int = 0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + context_channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
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
        return self.layer(x)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalization and ReLU (He et al. 2016, "identity mappings")."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = ActNorm((width, 1, 1)), ActNorm((width, 1, 1))
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)[0]))
        return x + self.conv2(F.relu(self.norm2(h)[0]))


class ResidualNet(nn.Module):
    """The residual conditioner of RealNVP (section 3.7): 3x3, `blocks` residual blocks, zero 1x1.

    ActNorm stands where the paper has batch normalization, so that an example does not see its batch mates.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int, context_channels: int = 0):
        super().__init__()
        self.first = nn.Conv2d(in_channels + context_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.norm = ActNorm((width, 1, 1))
        self.last = ZeroConv2d(width, out_channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.blocks(self.first(with_context(x, context)))
        return self.last(F.relu(self.norm(h)[0]))


class DenseNet(nn.Module):
    """ReLU layers of one width, then a zero linear layer (NICE, section 5.1): `(B, D)` to `(B, D')`."""

    def __init__(self, in_features: int, out_features: int, width: int, hidden_layers: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(hidden_layers):
            layers += [nn.Linear(in_features if i == 0 else width, width), nn.ReLU(inplace=True)]
        last = nn.Linear(width, out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x)

"""Variational dequantization: a second flow, q(u|x), draws the noise of an image."""

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections import (
    AffineTransform,
    Bijection,
    CheckerboardCoupling,
    Conv1x1LU,
    Coupling,
    Sequential,
    Squeeze,
)
from flowtrain.bijections.base import Executor, sum_per_example
from flowtrain.bijections.execution import FUSED
from flowtrain.bijections.precision import into_conditioner
from flowtrain.flow.dequantize import EDGE, LARGEST, SMALLEST
from flowtrain.nets.convolution import Conv2d, GlowNet, ReLU
from flowtrain.types import Shape


class VariationalNoise(nn.Module):
    """`u = Phi(g(eps; x))`, `eps = Phi^-1(noise)`, with a conditional flow g (Flow++, Ho et al.
    2019, section 3.1).

        log q(u|x) = log N(eps; 0, I) - log|det dg/deps| - log|det du/dg|

    Phi is the normal distribution function, where the paper has a sigmoid. The flow g starts as the
    identity, so u starts as uniform noise. An affine map, included in `log q`, takes u to
    `[EDGE, 1 - EDGE]`, which is inside its bin in float32.

    g is a chain of 1x1 convolutions and affine couplings of the two colours of a checkerboard in
    turn, at half the resolution if the height and the width are even. One network extracts from the
    image the features that all conditioners see.

    Args:
        shape: Shape of one image, `(C, H, W)`.
        steps: Number of flow steps. Each is a 1x1 convolution and a coupling.
        width: Channels of the hidden layers, and of the features of the image.
    """

    def __init__(self, shape: Shape, steps: int, width: int):
        super().__init__()
        channels, height, side = shape
        even = height % 2 == side % 2 == 0
        self.squeeze = Squeeze() if even else Sequential()
        if even:
            channels = 4 * channels
        layers: list[Bijection] = []
        for i in range(steps):
            mixing = Conv1x1LU(channels)
            mixing.set_weight(torch.eye(channels))
            layers.append(mixing)
            if even:  # the first half of the squeezed channels is one colour of the checkerboard
                half = channels // 2
                net = GlowNet(half, 2 * half, width, context_channels=width)
                layers.append(Coupling(half, net, AffineTransform(), swap=i % 2 == 1))
            else:  # the first parity is the one that transforms an image of one pixel
                net = GlowNet(channels, 2 * channels, width, context_channels=width)
                layers.append(
                    CheckerboardCoupling((height, side), net, AffineTransform(), parity=(i + 1) % 2)
                )
        self.flow = Sequential(*layers)
        self.context = nn.Sequential(
            Conv2d(channels, width, 3), ReLU(), Conv2d(width, width, 3), ReLU()
        )

    def forward(
        self, noise: Tensor, x: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        """Uniform noise and the scaled image to `u` and `log q(u|x)`, as `UniformNoise.forward`."""
        squeezed, image = (self.squeeze.run(executor, "forward", t)[0] for t in (noise, x))
        eps = torch.special.ndtri(squeezed.clamp(SMALLEST, LARGEST))
        # The context is for conditioners alone, and stays on their side of the border.
        context = self.context(into_conditioner(image))
        w, log_det = self.flow.run(executor, "forward", eps, context)
        log_q = _log_q(eps, w, -log_det)
        u = EDGE + (1 - 2 * EDGE) * torch.special.ndtr(w)
        return self.squeeze.run(executor, "inverse", u)[0], log_q

    def inverse(self, u: Tensor, x: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        """The noise that `forward` maps to `u`, and `log q(u|x)`. At the edges it is not exact."""
        squeezed, image = (self.squeeze.run(executor, "forward", t)[0] for t in (u, x))
        inside = ((squeezed - EDGE) / (1 - 2 * EDGE)).clamp(SMALLEST, LARGEST)
        w = torch.special.ndtri(inside)
        context = self.context(into_conditioner(image))
        eps, log_det = self.flow.run(executor, "inverse", w, context)
        log_q = _log_q(eps, w, log_det)
        return self.squeeze.run(executor, "inverse", torch.special.ndtr(eps))[0], log_q


def _log_q(eps: Tensor, w: Tensor, log_det: Tensor) -> Tensor:
    """`log q(u|x)` from `eps`, `w = g(eps)` and the log-determinant from w to eps."""
    # log N(eps) - log N(w), where the constants cancel: apart from the affine map, du/dw is the
    # standard normal density.
    squares = 0.5 * sum_per_example(w.square() - eps.square())
    return squares + log_det - w[0].numel() * math.log1p(-2 * EDGE)

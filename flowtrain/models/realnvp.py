"""RealNVP: Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio 2017,
arXiv:1605.08803).

The paper's data transform is the logit (`dequantization.transform: logit`), with alpha 0.05
(section 4.1).

Deliberate differences from the paper:
- ActNorm replaces batch normalization, between the couplings and inside the conditioners. No
  example sees the rest of its batch, and training and evaluation compute the same function.
- The log-scale is `2 tanh(h / 2)` with a learned gain inside. The paper has a learned scale times
  tanh.
- There is no weight normalization. ActNorm inside the residual blocks plays its part at the start.
- A residual block is two 3x3 convolutions.

Vectors `(C, 1, 1)`, such as points of the plane, cannot be squeezed. For them the model is
couplings that keep the halves of the vector by turns, with fully connected conditioners. With
`transform: spline` it is RQ-NSF (C) without its linear layers (Durkan et al. 2019).
"""

from typing import Annotated

from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    Bijection,
    CheckerboardCoupling,
    Coupling,
    Flatten,
    Multiscale,
    Sequential,
    Squeeze,
)
from flowtrain.models.base import TRANSFORMS, Elementwise, check_squeezes, vector_coupling
from flowtrain.nets.convolution import channels_of
from flowtrain.nets.residual import ResidualNet
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    context: Shape | None = None,
    *,
    levels: Positive = 2,
    width: Positive = 64,
    blocks: Annotated[int, Field(ge=0, le=2**20)] = 8,
    transform: Elementwise = "affine",
) -> Bijection:
    """RealNVP for images, the multiscale architecture of section 3.6.

    Each level but the last is three checkerboard couplings, a squeeze, and three channel couplings,
    after which half of the channels leave. The last level is four checkerboard couplings. All
    networks see a context of the shape `context` beside their input.

    Args:
        levels: Scales. The image is squeezed `levels - 1` times (the paper: "downscale
            only once" for CIFAR-10 is 2). For vectors: four couplings each.
        width: Feature maps in the conditioners at the first scale, doubled after each squeeze; for
            vectors, hidden units.
        blocks: Residual blocks per conditioner; for vectors, hidden layers.
        transform: Transform of an entry, named as for Glow's `coupling`.

    Raises:
        UserError: if the image cannot be squeezed `levels - 1` times.
    """
    elementwise = TRANSFORMS[transform]
    parameters = elementwise().parameters_per_entry
    if shape[1:] == (1, 1) and context is None:
        dims = shape[0]
        vector_layers: list[Bijection] = [Flatten(shape)]
        for i in range(4 * levels):
            coupling = vector_coupling(i, dims, width, blocks, elementwise())
            vector_layers += [ActNorm((dims,)), coupling]
        return Sequential(*vector_layers)
    check_squeezes(shape, levels - 1, levels)
    channels, height, side = shape
    level_bijections: list[Bijection] = []
    latent_shapes = []
    for level in range(levels):
        last = level == levels - 1
        layers: list[Bijection] = []
        seen = channels_of(context, (height, side))
        for i in range(4 if last else 3):
            net = ResidualNet(channels, parameters * channels, width, blocks, seen)
            layers += [
                CheckerboardCoupling((height, side), net, elementwise(), parity=i % 2),
                ActNorm((channels, 1, 1)),
            ]
        if not last:
            layers.append(Squeeze())
            channels, height, side, width = 4 * channels, height // 2, side // 2, 2 * width
            half, seen = channels // 2, channels_of(context, (height, side))
            for i in range(3):
                net = ResidualNet(half, parameters * half, width, blocks, seen)
                layers += [
                    Coupling(half, net, elementwise(), swap=i % 2 == 1),
                    ActNorm((channels, 1, 1)),
                ]
            channels = half
        latent_shapes.append((channels, height, side))
        level_bijections.append(Sequential(*layers))
    # As in the paper, the prior is N(0, I) at every scale.
    return Multiscale(level_bijections, [Sequential() for _ in range(levels)], latent_shapes)

"""RealNVP: Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio 2017,
arXiv:1605.08803).

Its data transform is the logit (`dequantization.transform: logit`, alpha 0.05 as in section 4.1).

Deliberate differences from the paper:
- ActNorm stands where it has batch normalization, between the couplings and inside the
  conditioners: no example sees its batch mates, and training and evaluation compute the same
  function;
- the log-scale is `2 tanh(h / 2)` with a learned gain inside, where the paper has a learned scale
  times tanh;
- no weight normalization: ActNorm inside the residual blocks plays its part at the start;
- a residual block is two 3x3 convolutions.

Data without extent, `(C, 1, 1)`, such as points of the plane, have nothing to squeeze: there it is
couplings on the halves of a vector by turns, with fully connected conditioners.
"""

from typing import Annotated

from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    AffineTransform,
    Bijection,
    CheckerboardCoupling,
    Coupling,
    Flatten,
    Multiscale,
    Sequential,
    Squeeze,
)
from flowtrain.models.geometry import check_squeezes
from flowtrain.nets.dense import DenseNet
from flowtrain.nets.residual import ResidualNet


def build(
    shape: tuple[int, int, int],
    *,
    levels: Annotated[int, Field(ge=1)] = 2,
    width: Annotated[int, Field(ge=1)] = 64,
    blocks: Annotated[int, Field(ge=0)] = 8,
) -> Bijection:
    """RealNVP for images of `shape` (C, H, W), the multiscale architecture of section 3.6.

    Each level but the last: three checkerboard couplings, squeeze, three channel couplings, and
    half of the channels leave. The last: four checkerboard couplings.

    Args:
        levels: scales; the image is squeezed `levels - 1` times (the paper: "downscale only once"
            for CIFAR-10 is 2). Of vectors: four couplings each.
        width: feature maps of the conditioners at the first scale, doubled after each squeeze. Of
            vectors: hidden units.
        blocks: residual blocks in each conditioner. Of vectors: hidden layers.

    Raises:
        UserError: where the image cannot be squeezed `levels - 1` times.
    """
    if shape[1:] == (1, 1):
        return _of_vectors(shape, 4 * levels, width, blocks)
    check_squeezes(shape, levels - 1, levels)
    channels, height, side = shape
    level_bijections: list[Bijection] = []
    priors: list[Bijection] = []
    latent_shapes = []
    for level in range(levels):
        last = level == levels - 1
        layers: list[Bijection] = []
        for i in range(4 if last else 3):
            net = ResidualNet(channels, 2 * channels, width, blocks)
            layers += [CheckerboardCoupling((height, side), net, AffineTransform(), parity=i % 2)]
            layers += [ActNorm((channels, 1, 1))]
        if not last:
            layers.append(Squeeze())
            channels, height, side, width = 4 * channels, height // 2, side // 2, 2 * width
            half = channels // 2
            for i in range(3):
                net = ResidualNet(half, 2 * half, width, blocks)
                layers += [
                    Coupling(half, net, AffineTransform(), swap=i % 2 == 1),
                    ActNorm((channels, 1, 1)),
                ]
            channels = half
            latent_shapes.append((half, height, side))
        else:
            latent_shapes.append((channels, height, side))
        level_bijections.append(Sequential(*layers))
        priors.append(Sequential())  # the prior is N(0, I) at every scale, as in the paper
    return Multiscale(level_bijections, priors, latent_shapes)


def _of_vectors(
    shape: tuple[int, int, int], couplings: int, width: int, hidden_layers: int
) -> Bijection:
    dims = shape[0]
    layers: list[Bijection] = [Flatten(shape)]
    for i in range(couplings):
        kept = (dims + 1) // 2 if i % 2 == 0 else dims // 2
        net = DenseNet(kept, 2 * (dims - kept), width, hidden_layers)
        layers += [ActNorm((dims,)), Coupling(kept, net, AffineTransform(), swap=i % 2 == 1)]
    return Sequential(*layers)

"""MAF: Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou & Murray 2017,
arXiv:1705.07057).

Its data transform for images is the logit (`dequantization.transform: logit`; alpha 1e-6 for MNIST,
0.05 for CIFAR-10). A density takes one pass, samples take D steps a layer.

Deliberate differences from the paper:
- ActNorm stands in front of each layer, where it has batch normalization behind: no example sees
  its batch mates;
- the log-scale is `2 tanh(h / 2)`: bounded both ways; and `transform` has others than the affine
  one;
- the conditioners (MADE, Germain et al. 2015) end in zeros, so that the flow starts as the
  identity; their degrees are evenly spaced, and each row of weights is initialized by the number of
  inputs that it sees;
- no mixture base (the paper's MAF MoG).
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    AffineTransform,
    Bijection,
    Flatten,
    MaskedAutoregressive,
    MixtureTransform,
    Permute,
    Sequential,
    SplineTransform,
    Transform,
)
from flowtrain.nets.masked import MaskedDenseNet

Positive = Annotated[int, Field(ge=1)]
Order = Literal["reverse", "random"]
Kind = Literal["affine", "spline", "mixture"]

TRANSFORMS: dict[Kind, Callable[[], Transform]] = {
    "affine": AffineTransform,
    "spline": SplineTransform,
    "mixture": MixtureTransform,
}


def build(
    shape: tuple[int, int, int],
    *,
    layers: Positive = 5,
    width: Positive = 1024,
    hidden_layers: Positive = 1,
    order: Order = "reverse",
    transform: Kind = "affine",
) -> Bijection:
    """MAF for data of `shape` (C, H, W), its entries in the order in which they are stored.

    Args:
        layers: autoregressive layers; the paper has 5 and 10.
        width: units of a hidden layer.
        hidden_layers: of each conditioner.
        order: of the entries in the next layer: reversed, or a random permutation.
        transform: of an entry, given those before it: affine, spline (rational-quadratic, Durkan et
            al. 2019), or mixture (of logistics, Ho et al. 2019).
    """
    return chain(shape, layers, width, hidden_layers, order, transform, lambda layer: layer)


def chain(
    shape: tuple[int, int, int],
    layers: int,
    width: int,
    hidden_layers: int,
    order: Order,
    transform: Kind,
    direction: Callable[[Bijection], Bijection],
) -> Bijection:
    """What MAF and IAF share: `direction` is applied to each autoregressive layer; ActNorm always
    sees the data.
    """
    dims = shape[0] * shape[1] * shape[2]
    bijections: list[Bijection] = [Flatten(shape)]
    for i in range(layers):
        if i > 0:
            bijections.append(
                Permute(torch.arange(dims).flip(0) if order == "reverse" else torch.randperm(dims))
            )
        elementwise = TRANSFORMS[transform]()
        net = MaskedDenseNet(dims, elementwise.parameters_per_entry, width, hidden_layers)
        bijections += [ActNorm((dims,)), direction(MaskedAutoregressive(net, elementwise))]
    return Sequential(*bijections)

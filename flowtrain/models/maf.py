"""MAF: Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou & Murray 2017,
arXiv:1705.07057).

For images the paper's data transform is the logit (`dequantization.transform: logit`), with alpha
1e-6 for MNIST and 0.05 for CIFAR-10. A density takes one pass. Samples take D steps per layer.

Deliberate differences from the paper:
- An ActNorm precedes each layer, where the paper has batch normalization behind each. No example
  sees the rest of its batch.
- The log-scale is `2 tanh(h / 2)`, which is bounded both ways. `transform` offers others than the
  affine one.
- The conditioners (MADE, Germain et al. 2015) end in zeros, so the flow starts as the identity.
  Their degrees are evenly spaced. Each row of weights is initialized by the number of inputs that
  it sees.
- There is no mixture base (the paper's MAF MoG).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

from flowtrain.bijections import (
    ActNorm,
    Bijection,
    Flatten,
    MaskedAutoregressive,
    Permute,
    Sequential,
)
from flowtrain.models.base import TRANSFORMS, Elementwise
from flowtrain.nets.masked import MaskedDenseNet
from flowtrain.types import Positive, Shape

Order = Literal["reverse", "random"]


def build(
    shape: Shape,
    *,
    layers: Positive = 5,
    width: Positive = 1024,
    hidden_layers: Positive = 1,
    order: Order = "reverse",
    transform: Elementwise = "affine",
) -> Bijection:
    """MAF for data. The entries are in the order in which they are stored.

    Args:
        layers: Autoregressive layers. The paper has 5 and 10.
        width: Units per hidden layer.
        hidden_layers: Hidden layers per conditioner.
        order: Order of the entries in the next layer: reversed, or a random permutation.
        transform: Transform of an entry, given the earlier ones, named as for Glow's `coupling`.
            The paper has exp.
    """
    return chain(shape, layers, width, hidden_layers, order, transform, lambda layer: layer)


def chain(
    shape: Shape,
    layers: int,
    width: int,
    hidden_layers: int,
    order: Order,
    transform: Elementwise,
    direction: Callable[[Bijection], Bijection],
) -> Bijection:
    """MAF or IAF: `direction` wraps autoregressive layers, but not ActNorm, which sees the data."""
    dims = math.prod(shape)
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

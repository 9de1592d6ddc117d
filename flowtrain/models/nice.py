"""NICE: Non-linear Independent Components Estimation (Dinh, Krueger & Bengio 2015,
arXiv:1410.8516).

Additive couplings on the flattened image, even entries against odd ones, one diagonal scaling, and
a logistic prior.

Deliberate differences from the paper:
- the last layer of each conditioner starts at zero, so that the flow starts as the identity;
- the diagonal scaling is set from the first batch and has a shift (ActNorm); its log-scale is
  bounded by tanh to +-8;
- the logistic prior is a fixed layer in front of the standard normal base, which is the same
  likelihood;
- uniform dequantization and centring, without the paper's ZCA for CIFAR-10.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    Bijection,
    Coupling,
    Flatten,
    LogisticToNormal,
    Permute,
    Sequential,
)
from flowtrain.nets.dense import DenseNet


def build(
    shape: tuple[int, int, int],
    *,
    couplings: Annotated[int, Field(ge=2)] = 4,
    width: Annotated[int, Field(ge=1)] = 1000,
    hidden_layers: Annotated[int, Field(ge=1)] = 5,
    prior: Literal["logistic", "gaussian"] = "logistic",
) -> Bijection:
    """NICE for images of `shape` (C, H, W) (section 5.1: four couplings; five hidden layers of 1000
    for MNIST).

    Args:
        couplings: coupling layers; which half is kept alternates.
        width: units of a hidden layer.
        hidden_layers: hidden layers of each conditioner.
        prior: of the latent; the paper takes the Gaussian for TFD and the logistic elsewhere.
    """
    dims = shape[0] * shape[1] * shape[2]
    entries = torch.arange(dims)
    layers: list[Bijection] = [Flatten(shape), Permute(torch.cat([entries[::2], entries[1::2]]))]
    for i in range(couplings):
        # Alternately the even entries (the first half, the larger one where D is odd) and the odd
        # ones are kept.
        kept = (dims + 1) // 2 if i % 2 == 0 else dims // 2
        net = DenseNet(kept, dims - kept, width, hidden_layers)
        layers.append(Coupling(kept, net, AdditiveTransform(), swap=i % 2 == 1))
    layers.append(ActNorm((dims,)))
    if prior == "logistic":
        layers.append(LogisticToNormal())
    return Sequential(*layers)

"""NICE: Non-linear Independent Components Estimation (Dinh, Krueger & Bengio 2015,
arXiv:1410.8516).

Additive couplings of even and odd entries of the flattened image, one diagonal scaling, and a
logistic prior.

Deliberate differences from the paper:
- The last layer of each conditioner starts at zero, so the flow starts as the identity.
- The diagonal scaling is an ActNorm: it is set from the first batch and has a shift. Its log-scale
  is bounded by tanh to +-8.
- The logistic prior is a fixed layer in front of the standard normal base. The likelihood is the
  same.
- Dequantization is uniform and centred, without the paper's ZCA for CIFAR-10.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    Bijection,
    Flatten,
    LogisticToNormal,
    Permute,
    Sequential,
)
from flowtrain.models.base import vector_coupling
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    *,
    couplings: Annotated[int, Field(ge=2, le=2**20)] = 4,
    width: Positive = 1000,
    hidden_layers: Positive = 5,
    prior: Literal["logistic", "gaussian"] = "logistic",
) -> Bijection:
    """NICE for images. The defaults are the paper's for MNIST (section 5.1).

    Args:
        couplings: Number of couplings, which keep the even and the odd entries by turns.
        width: Units per hidden layer.
        hidden_layers: Hidden layers per conditioner.
        prior: Prior of the latent. The paper takes the Gaussian for TFD and the logistic elsewhere.
    """
    dims = math.prod(shape)
    entries = torch.arange(dims)
    even_then_odd = torch.cat([entries[::2], entries[1::2]])
    layers: list[Bijection] = [Flatten(shape), Permute(even_then_odd)]
    for i in range(couplings):
        layers.append(vector_coupling(i, dims, width, hidden_layers, AdditiveTransform()))
    layers.append(ActNorm((dims,)))
    if prior == "logistic":
        layers.append(LogisticToNormal())
    return Sequential(*layers)

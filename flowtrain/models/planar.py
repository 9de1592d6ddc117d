"""Planar flows: Variational Inference with Normalizing Flows (Rezende & Mohamed 2015,
arXiv:1505.05770, section 4.1).

Deliberate differences from the paper:
- A layer has its closed form from data to latent, which is what maximum likelihood computes.
  Samples come from its inverse, one monotone equation per layer. The paper, on variational
  inference, has its closed form from latent to posterior.
- The constraint that keeps a layer invertible is an exponential linear unit, with a derivative of
  at least 0.001.
- u starts at zero, so the flow starts as the identity. An ActNorm in front brings the data to unit
  variance.
"""

import math

from flowtrain.bijections import ActNorm, Bijection, Flatten, Planar, Sequential
from flowtrain.types import Positive, Shape


def build(shape: Shape, *, layers: Positive = 32) -> Bijection:
    """Planar flow for vectors and flattened images.

    Args:
        layers: Number of layers, K, each of which bends space along one direction. The paper has up
            to 32 in two dimensions, and up to 80 elsewhere.
    """
    dims = math.prod(shape)
    return Sequential(Flatten(shape), ActNorm((dims,)), *(Planar(dims) for _ in range(layers)))

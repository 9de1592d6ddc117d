"""Planar flows: Variational Inference with Normalizing Flows (Rezende & Mohamed 2015,
arXiv:1505.05770, section 4.1).

Deliberate differences from the paper:
- the closed form of a layer is data to latent, which is what maximum likelihood computes; samples
  come from its inverse, one monotone equation a layer. In the paper it is latent to posterior, for
  variational inference;
- the constraint that keeps a layer invertible is an exponential linear unit, with a derivative of
  0.001 or more;
- u starts at zero, so that the flow starts as the identity; an ActNorm in front brings the data to
  unit variance.
"""

from typing import Annotated

from pydantic import Field

from flowtrain.bijections import ActNorm, Bijection, Flatten, Planar, Sequential


def build(shape: tuple[int, int, int], *, layers: Annotated[int, Field(ge=1)] = 32) -> Bijection:
    """Planar flow for data of `shape` (C, H, W): one layer bends space along one direction.

    Args:
        layers: K; the paper has up to 32 in two dimensions, and up to 80 elsewhere.
    """
    dims = shape[0] * shape[1] * shape[2]
    return Sequential(Flatten(shape), ActNorm((dims,)), *(Planar(dims) for _ in range(layers)))

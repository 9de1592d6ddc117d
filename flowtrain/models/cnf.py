"""Continuous flows: FFJORD (Grathwohl et al. 2019, arXiv:1810.01367), on vectors and on flattened
images.

Deliberate differences from the paper:
- reported likelihoods have the exact trace; Hutchinson's estimator is for gradients alone, and
  above 16 dimensions;
- the error of a step is the largest of all entries and examples, not a mean over the batch, and
  tolerances are a hundredth in evaluation, so that there batch mates change a likelihood by
  rounding alone;
- an ActNorm before each block, where the paper has a batch normalization between them; a block
  starts as the identity;
- time runs from 0 to 1: the paper learns the end, which is the same as a factor of the velocity;
- images are flattened, without the convolutions and multi-scale architecture of the paper's MNIST
  and CIFAR-10.
"""

from typing import Annotated

from pydantic import Field

from flowtrain.bijections import ActNorm, Bijection, Continuous, Flatten, Sequential
from flowtrain.bijections.continuous import Dynamics, Solver, Trace, torchdiffeq

Tolerance = Annotated[float, Field(gt=0, lt=1)]


def build(
    shape: tuple[int, int, int],
    *,
    blocks: Annotated[int, Field(ge=1)] = 1,
    width: Annotated[int, Field(ge=1)] = 64,
    hidden_layers: Annotated[int, Field(ge=1)] = 3,
    solver: Solver = "dopri5",
    rtol: Tolerance = 1e-4,
    atol: Tolerance = 1e-4,
    trace: Trace = "auto",
    adjoint: bool = False,
) -> Bijection:
    """Continuous flow for data of `shape` (C, H, W) (the paper's for 2-D data: one block, three
    layers of 64).

    Args:
        blocks: differential equations, one after the other.
        width: units of a hidden layer of the velocity's network.
        hidden_layers: hidden layers of it.
        solver: dopri5, or dopri8 for tolerances near the rounding of the numbers.
        rtol: relative tolerance of a step of the solver in training; in evaluation a hundredth of
            it.
        atol: absolute tolerance, likewise.
        trace: exact or hutchinson, for gradients; auto is exact up to 16 dimensions. Evaluation is
            always exact.
        adjoint: gradients from the adjoint equation: less memory, more time.
    """
    torchdiffeq()  # says here that it is missing
    dims = shape[0] * shape[1] * shape[2]
    layers: list[Bijection] = [Flatten(shape)]
    for _ in range(blocks):
        dynamics = Dynamics(dims, width, hidden_layers)
        layers += [ActNorm((dims,)), Continuous(dynamics, solver, rtol, atol, trace, adjoint)]
    return Sequential(*layers)

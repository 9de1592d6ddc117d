"""Continuous flows: FFJORD (Grathwohl et al. 2019, arXiv:1810.01367), on vectors and on flattened
images.

Deliberate differences from the paper:
- Reported likelihoods use the exact trace. Hutchinson's estimator serves gradients only, above 16
  dimensions.
- The error of a step is the largest of all entries and examples, not a mean over the batch.
  Outside training the tolerances are 100 times tighter, so the rest of the batch changes a
  likelihood by rounding only.
- An ActNorm precedes each block, where the paper has a batch normalization between blocks. A block
  starts as the identity.
- Time runs from 0 to 1. The paper learns the end, which is the same as a factor of the velocity.
- Images are flattened. The paper's models of MNIST and CIFAR-10 have convolutions and several
  scales.
"""

import math
from typing import Annotated

from pydantic import Field

from flowtrain.bijections import ActNorm, Bijection, Continuous, Flatten, Sequential
from flowtrain.bijections.continuous import Dynamics, Solver, Trace, torchdiffeq
from flowtrain.types import Positive, Shape

Tolerance = Annotated[float, Field(gt=0, lt=1)]


def build(
    shape: Shape,
    *,
    blocks: Positive = 1,
    width: Positive = 64,
    hidden_layers: Positive = 3,
    solver: Solver = "dopri5",
    rtol: Tolerance = 1e-4,
    atol: Tolerance = 1e-4,
    trace: Trace = "auto",
    adjoint: bool = False,
) -> Bijection:
    """Continuous flow. It needs the extra `cnf`. The defaults are the paper's for 2-D data.

    Args:
        blocks: Differential equations, one after the other.
        width: Units per hidden layer of the velocity's network.
        hidden_layers: Hidden layers of that network.
        solver: Runge-Kutta method, of order 5 or 8. dopri8 is for tolerances near rounding.
        rtol: Relative tolerance of a solver step in training; 100 times tighter elsewhere.
        atol: Absolute tolerance of a solver step in training; 100 times tighter elsewhere.
        trace: Trace of the Jacobian in training: exact, hutchinson (an estimate), or auto, which is
            exact up to 16 dimensions. Reported likelihoods always use the exact trace.
        adjoint: Compute gradients by the adjoint equation: slower, but memory does not grow with
            the number of solver steps.

    Raises:
        UserError: if torchdiffeq is not installed.
    """
    torchdiffeq()
    dims = math.prod(shape)
    layers: list[Bijection] = [Flatten(shape)]
    for _ in range(blocks):
        dynamics = Dynamics(dims, width, hidden_layers)
        layers += [ActNorm((dims,)), Continuous(dynamics, solver, rtol, atol, trace, adjoint)]
    return Sequential(*layers)

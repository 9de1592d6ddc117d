"""Planar flows.

Rezende & Mohamed 2015, "Variational Inference with Normalizing Flows", arXiv:1505.05770.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import Bijection, Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.monotone import solve_monotone

MIN_DERIVATIVE = 1e-3  # of the map along w; so the inverse stretches by at most 1000


class Planar(Bijection):
    """`z = x + u tanh(w^T x + b)` on vectors `(B, D)` (eq. 10-12).

    `log|det| = log(1 + w^T u sech^2(w^T x + b))`. The closed form maps data to latents, unlike in
    the paper, because maximum likelihood needs it. The inverse solves `c + w^T u tanh(c) = w^T z +
    b` for `c = w^T x + b`, one monotone equation per example. Then `x = z - u tanh(c)`.

    The constraint `w^T u > -1` (appendix A.1) is kept by moving u along w to where `w^T u` is
    `m(w^T u)`. The paper's m is `m(t) = -1 + log(1 + exp(t))`. Here m is an exponential linear
    unit: t for t >= 0, and above `-1 + MIN_DERIVATIVE` for t < 0. So u = 0, at the start, is the
    identity, and nothing is divided by zero as w goes to 0.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(dims) / dims**0.5)
        self.u = nn.Parameter(torch.zeros(dims))
        self.b = nn.Parameter(torch.randn(()))

    def untraceable_directions(self) -> list[Direction]:
        return ["inverse"]

    def constrained(self) -> tuple[Tensor, Tensor]:
        """The u in use, `(D,)`, and its product with w, in `[-1 + MIN_DERIVATIVE, inf)`."""
        product = (self.w * self.u).sum()
        most = 1 - MIN_DERIVATIVE
        allowed = most * F.elu(product / most)
        # `allowed - product` is at most of the order of |w|^2 |u|^2. It is divided by |w| twice,
        # because the square of |w| underflows. So the change of u vanishes with w.
        length = torch.linalg.vector_norm(self.w).clamp(min=torch.finfo(self.w.dtype).tiny ** 0.5)
        return self.u + (allowed - product) / length * (self.w / length), allowed

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        u, product = self.constrained()
        h = ((x * self.w).sum(dim=1) + self.b).tanh()
        return x + h[:, None] * u, torch.log1p(product * (1 - h.square()))

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Solved to float precision. It has the first derivatives of the inverse function."""
        u, product = self.constrained()
        target = (z * self.w).sum(dim=1) + self.b

        def along(c: Tensor) -> tuple[Tensor, Tensor]:
            h = c.tanh()
            return c + product * h, 1 + product * (1 - h.square())

        reach = product.abs()  # tanh is within [-1, 1]
        c = solve_monotone(along, target, target - reach, target + reach)
        # One more Newton step gives c its gradient.
        value, derivative = along(c)
        c = c + (target - value) / derivative.detach()
        h = c.tanh()
        return z - h[:, None] * u, -torch.log1p(product * (1 - h.square()))

"""Planar flows (Rezende & Mohamed 2015, "Variational Inference with Normalizing Flows",
arXiv:1505.05770).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.monotone import solve_monotone

# of the map along w, as of a spline at a knot: the inverse stretches by 1000 at most
MIN_DERIVATIVE = 1e-3


class Planar(Bijection):
    """`z = x + u tanh(w^T x + b)`, `log|det| = log(1 + w^T u sech^2(w^T x + b))` (eq. 10-12), on
    vectors `(B, D)`.

    The closed form is data to latent, the direction that maximum likelihood needs; the paper has it
    the other way round, from a base that it draws to a posterior that it scores. With `c = w^T x +
    b`, the inverse is the root of `c + w^T u tanh(c) = w^T z + b`, one monotone equation an
    example, and then `x = z - u tanh(c)`.

    The constraint `w^T u > -1` (appendix A.1) is kept by moving u along w to where `w^T u` is
    `m(w^T u)`. The paper's m is `-1 + log(1 + exp(t))`; here it is an exponential linear unit, t
    for t >= 0 and above `-1 + MIN_DERIVATIVE`
    below: so u stays as it is where the constraint holds by far, the layer with u = 0 (the start)
    is the identity, and nothing is divided by zero as w goes to 0.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(dims) / dims**0.5)
        self.u = nn.Parameter(torch.zeros(dims))
        self.b = nn.Parameter(torch.randn(()))

    def constrained(self) -> tuple[Tensor, Tensor]:
        """The u that is used, `(D,)`, and its product with w, in `[-1 + MIN_DERIVATIVE, inf)`."""
        product = (self.w * self.u).sum()
        most = 1 - MIN_DERIVATIVE
        allowed = most * F.elu(product / most)
        # The difference is at most of the order of |w|^2 |u|^2: divided by |w| twice, and not by
        # its square, which underflows, it vanishes with w, and its gradient is finite.
        length = torch.linalg.vector_norm(self.w).clamp(min=torch.finfo(self.w.dtype).tiny ** 0.5)
        return self.u + (allowed - product) / length * (self.w / length), allowed

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, product = self.constrained()
        h = ((x * self.w).sum(dim=1) + self.b).tanh()
        return x + h[:, None] * u, torch.log1p(product * (1 - h.square()))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """To float precision by Newton's method. Its first derivatives are those of the inverse
        function.
        """
        u, product = self.constrained()
        target = (z * self.w).sum(dim=1) + self.b

        def along(c: Tensor) -> tuple[Tensor, Tensor]:
            h = c.tanh()
            return c + product * h, 1 + product * (1 - h.square())

        reach = product.abs()  # tanh is within [-1, 1]
        c = solve_monotone(along, target, target - reach, target + reach)
        # Another of Newton's steps, which gives c its gradient.
        value, derivative = along(c)
        c = c + (target - value) / derivative.detach()
        h = c.tanh()
        return z - h[:, None] * u, -torch.log1p(product * (1 - h.square()))

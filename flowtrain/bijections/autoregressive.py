"""Masked autoregressive flows (Papamakarios et al. 2017, arXiv:1705.07057), and any bijection the
other way round.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Transform, sum_per_example
from flowtrain.bijections.precision import conditioner_output, full_precision

if TYPE_CHECKING:
    from flowtrain.nets.masked import MaskedDenseNet


class MaskedAutoregressive(Bijection):
    """`z_d = T(x_d; parameters of x_1, ..., x_{d-1})` (MAF, eq. 3-5) on vectors `(B, D)`, T any
    elementwise transform.

    The Jacobian is lower triangular, its log-determinant the sum of T's log-derivatives. `forward`
    is one pass of the conditioner. `inverse` takes the D entries one after the other, but computes
    each hidden unit once, when the last of the entries that it sees is there: about the arithmetic
    of one pass, in D small steps. It is in full precision, whatever autocast says, and
    differentiable.

    The order is that of the entries; other orders come from a `Permute` before it.
    """

    inverse_is_sequential = True

    def __init__(self, conditioner: "MaskedDenseNet", transform: Transform):
        super().__init__()
        self.conditioner = conditioner
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parameters = conditioner_output(self.conditioner(x, context), x.dtype)
        z, log_derivative = self.transform(x, parameters)
        return z, sum_per_example(log_derivative)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        entries = z.split(1, dim=1)
        log_derivatives: list[Tensor] = []

        def next_entry(parameters: Tensor) -> Tensor:
            x, log_derivative = self.transform.inverse(entries[len(log_derivatives)], parameters)
            log_derivatives.append(log_derivative)
            return x

        with full_precision(z):
            x = self.conditioner.entry_by_entry(next_entry, z.shape[0], context)
        return x, sum_per_example(torch.cat(log_derivatives, dim=1))


class Inverse(Bijection):
    """A bijection the other way round. Of a masked autoregressive layer it is an inverse
    autoregressive one (IAF, Kingma et al. 2016, eq. 9-10): one pass from latent to data, and D
    steps for the density of given data.

    Only for layers that do not set themselves from data.
    """

    inverse_is_sequential = False  # but its forward is, if the other's inverse is

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, context)

"""Masked autoregressive flows (MAF, Papamakarios et al. 2017, arXiv:1705.07057), and `Inverse`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Direction, Executor, Transform, sum_per_example
from flowtrain.bijections.context import Context, Guided
from flowtrain.bijections.execution import Container, opposite
from flowtrain.bijections.precision import apply_conditioner, full_precision


class AutoregressiveNet(nn.Module):
    """Maps `(B, D)` to `(B, P D)`: P parameters per entry, which depend on earlier entries only."""

    def entry_by_entry(
        self, next_entry: Callable[[Tensor], Tensor], batch: int, context: Tensor | None = None
    ) -> Tensor:
        """`x` `(B, D)`, built in order; `next_entry` maps parameters `(B, P)` to `(B, 1)`."""
        raise NotImplementedError


class Autoregressive(Bijection):
    """`z_n = T(x_n; parameters of x_1, ..., x_{n-1})`, where x_n are the parts of an example.

    T is any elementwise transform. The Jacobian is block triangular with diagonal blocks, so its
    log-determinant is the sum of T's log-derivatives. `forward` is one pass of the conditioner.
    `inverse`, which subclasses define, computes one part after the other, in full precision.
    """

    inverse_is_sequential = True
    has_network = True
    reversible_in = ("fp32",)  # the inverse runs in float32, `forward` in bf16

    def __init__(self, conditioner: nn.Module, transform: Transform):
        super().__init__()
        self.conditioner = conditioner
        self.transform = transform

    def count(self, x: Tensor) -> int:
        """How many parts an example has."""
        raise NotImplementedError

    def parameters_of(self, x: Tensor, context: Context | None) -> Tensor:
        return apply_conditioner(self.conditioner, x, context)

    def by_entry(self, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """`z` and the log-derivatives, both of the shape of `x`."""
        return self.transform(x, self.parameters_of(x, context))

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.by_entry(x, context)
        return z, sum_per_example(log_derivative)

    def untraceable_directions(self) -> list[Direction]:
        return ["inverse"]


class MaskedAutoregressive(Autoregressive):
    """An autoregressive layer on the entries of vectors `(B, D)` (MAF, eq. 3-5).

    `inverse` computes each hidden unit once, so it needs the arithmetic of about one pass, in D
    small steps. A `Permute` before the layer gives other orders of the entries.
    """

    conditioner: AutoregressiveNet

    def count(self, x: Tensor) -> int:
        return x.shape[1]

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        entries = z.split(1, dim=1)
        log_derivatives: list[Tensor] = []

        def next_entry(parameters: Tensor) -> Tensor:
            x, log_derivative = self.transform.inverse(entries[len(log_derivatives)], parameters)
            log_derivatives.append(log_derivative)
            return x

        build = self.conditioner.entry_by_entry
        with full_precision(z):
            if isinstance(context, Guided):
                x = context.in_order(build, next_entry)
            else:
                x = build(next_entry, z.shape[0], context)
        return x, sum_per_example(torch.cat(log_derivatives, dim=1))


class Inverse(Container):
    """A bijection with its two directions exchanged.

    The inverse of a masked autoregressive layer is an inverse autoregressive one (IAF, Kingma et
    al. 2016, eq. 9-10). Layers that are set from the first batch do not work inside.
    """

    inverse_is_sequential = False  # its `forward` is, if the inverse of `bijection` is

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def inner_layers(self) -> Iterable[Bijection]:
        return [self.bijection]

    def untraceable_directions(self) -> list[Direction]:
        return [opposite(direction) for direction in self.bijection.untraceable_directions()]

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.bijection.run(executor, opposite(direction), x, context)

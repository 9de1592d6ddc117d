"""Inverses that take many steps: their progress, iteration in their place, and a forward pass by
their arithmetic.
"""

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Bijection, Direction, sum_per_example
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import Container, Fused, call
from flowtrain.bijections.ordinal import OrdinalAutoregressive
from flowtrain.bijections.precision import full_precision
from flowtrain.bijections.token_autoregressive import TokenAutoregressive

Progress = Callable[[float], None]  # gets the share that is done


@singledispatch
def inverse_with_progress(
    layer: Bijection, z: Tensor, context: Context | None, progress: Progress
) -> tuple[Tensor, Tensor]:
    """`layer.inverse`. A layer that takes long calls `progress`."""
    return layer.inverse(z, context)


inverse_with_progress.register(OrdinalAutoregressive, OrdinalAutoregressive.inverse)
inverse_with_progress.register(TokenAutoregressive, TokenAutoregressive.inverse)


@singledispatch
def inverse_by_iteration(
    layer: Bijection, z: Tensor, context: Context | None, progress: Progress
) -> tuple[Tensor, Tensor]:
    """`layer.inverse` within rounding, by fixed-point iteration if the layer is autoregressive."""
    return inverse_with_progress(layer, z, context, progress)


@inverse_by_iteration.register
def _(
    layer: Autoregressive, z: Tensor, context: Context | None, progress: Progress
) -> tuple[Tensor, Tensor]:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer.transform.inverse(z, layer.parameters_of(x, context))

    with full_precision(z):
        x, log_derivative = fixed_point(step, z, layer.count(z), progress)
    return x, sum_per_example(log_derivative)


@singledispatch
def forward_matching_inverse(
    layer: Bijection, x: Tensor, context: Context | None, progress: Progress
) -> tuple[Tensor, Tensor]:
    """`layer.forward`, by the arithmetic of `inverse` if this is a step function of its input."""
    return layer(x, context)


forward_matching_inverse.register(
    OrdinalAutoregressive, OrdinalAutoregressive.forward_matching_inverse
)


def iterates(bijection: Bijection) -> bool:
    """Whether `inverse_by_iteration` is another way for any layer."""
    way = inverse_by_iteration.dispatch
    return any(way(type(module)) is not way(Bijection) for module in bijection.modules())


def sequential_layers(bijection: Bijection) -> int:
    """How many of the layers have a sequential inverse, but at least 1."""
    layers = [module for module in bijection.modules() if isinstance(module, Bijection)]
    single = [layer for layer in layers if not isinstance(layer, Container)]
    return max(1, sum(layer.inverse_is_sequential for layer in single))


class MatchingInverse(Fused):
    """Computes latents from which `inverse` gives back exactly the data."""

    def __init__(self, progress: Progress = lambda share: None):
        self.progress = progress

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            return forward_matching_inverse(layer, x, context, self.progress)
        return layer.inverse(x, context)


class WithProgress(Fused):
    """Calls `progress` with the share of a pass of inverses that is done.

    Only the `layers` whose inverse is sequential count (`sequential_layers`).
    """

    inverse = staticmethod(inverse_with_progress)

    def __init__(self, progress: Progress, layers: int = 1):
        self.progress, self.layers = progress, layers
        self.done = 0  # layers

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            return call(layer, direction, x, context)
        result = self.inverse(
            layer, x, context, lambda share: self.progress((self.done + share) / self.layers)
        )
        self.done += layer.inverse_is_sequential
        return result


class Iterating(WithProgress):
    inverse = staticmethod(inverse_by_iteration)


def tolerance(x: Tensor) -> float:
    """By how much of 1 + |x| an entry may move and count as settled: 2.6e-5 in float32."""
    return float(4 * torch.finfo(x.dtype).eps ** 0.75)


def fixed_point(
    step: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, at_most: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Jacobi iteration: `x` with `step(x)[0] == x`, and `step(x)[1]`.

    `step` computes each part of an example from the parts before it (Song et al. 2021,
    arXiv:2002.03629; for TarFlow: Liu & Qin 2025, arXiv:2505.12849). So after k steps the first k
    of `at_most` parts are right. It ends sooner once no entry moves by more than `tolerance`.
    """
    x = start
    for done in range(1, at_most + 1):
        # A guess may overflow, and attention would spread NaN to all tokens.
        before = torch.nan_to_num(x, 0.0, 0.0, 0.0)
        x, result = step(before)
        progress(done / at_most)
        if torch.allclose(x, before, tolerance(x), tolerance(x)):
            break
    return x, result

"""The layers of a flow by name: inputs and outputs, scales, and values that are not finite."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowtrain.bijections import Bijection, CheckerboardCoupling, Coupling, DiagonalAffine
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.execution import Container, LayerByLayer, call
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import watch_modules

Around = Callable[[str, Bijection, Direction, Tensor, Context | None], tuple[Tensor, Tensor]]


def layers_of(flow: Flow) -> dict[str, Bijection]:
    """The layers of a flow by name, in order: the bijections that are not containers."""
    return {short_name(name): layer for name, layer in _layers(flow, "")}


def _layers(module: nn.Module, prefix: str) -> list[tuple[str, Bijection]]:
    if isinstance(module, Bijection) and not isinstance(module, Container):
        return [(prefix[:-1], module)]
    return [
        layer
        for name, part in module.named_children()
        for layer in _layers(part, f"{prefix}{name}.")
    ]


def short_name(name: str) -> str:
    """A module's name in messages and metrics, without the prefix `bijection.`."""
    return name.removeprefix("bijection.")


class Watching(LayerByLayer):
    """Calls `around(name, layer, direction, input, context)` for the result of each layer."""

    def __init__(self, flow: Flow, around: Around):
        self.names = {layer: name for name, layer in layers_of(flow).items()}
        self.around = around

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        return self.around(self.names[layer], layer, direction, x, context)


@singledispatch
def log_scales(module: nn.Module) -> Tensor | None:
    """The log-scales among the parameters of a layer or class prior, of any shape, or None."""
    return None


@log_scales.register
def _(module: DiagonalAffine | ClassPrior) -> Tensor:
    return module.bounded_log_scale()


@singledispatch
def predicted_log_scales(layer: Bijection, x: Tensor, context: Context | None) -> Tensor | None:
    """The log-scales that a network predicts for the input `x`, of any shape, or None."""
    return None


@predicted_log_scales.register
def _(layer: Autoregressive | Coupling, x: Tensor, context: Context | None) -> Tensor:
    return layer.by_entry(x, context)[1]


@predicted_log_scales.register
def _(layer: CheckerboardCoupling, x: Tensor, context: Context | None) -> Tensor:
    return layer.by_entry(x, context)[1][..., ~layer.keep]


@singledispatch
def mixing_matrix(layer: Bijection) -> Tensor | None:
    """The matrix `(C, C)` of a linear layer, or None."""
    return None


mixing_matrix.register(LinearChannels, LinearChannels.mixing_matrix)


@torch.no_grad()
def log_scale_ranges(flow: Flow, x: Tensor, noise: Tensor) -> dict[str, tuple[float, float]]:
    """The smallest and largest log-scale, by name. A bijection's parameters have its own name,
    and the predictions of a layer's network on the batch `x` the name of its `transform`.
    """
    found = {
        short_name(name): log_scales(module)
        for name, module in flow.named_modules()
        if isinstance(module, Bijection)
    }

    def around(
        name: str, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            found[f"{name}.transform"] = predicted_log_scales(layer, x, context)
        return call(layer, direction, x, context)

    flow.to_latents(x, noise, Watching(flow, around))
    return {
        name: (values.min().item(), values.max().item())
        for name, values in found.items()
        # A checkerboard may keep all of an image of one pixel.
        if values is not None and values.numel()
    }


def first_non_finite(flow: Flow, x: Tensor, noise: Tensor) -> str | None:
    """Names the first parameter, module output, or else gradient with a value that is not finite:
    of gradients, which travel from the last layer to the first, the last one in forward order.
    """
    for name, parameter in flow.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not found and not all(torch.isfinite(t).all() for t in tensors):
            found.append(f"output of {name or 'the flow'}")

    watch_modules(flow, x, noise, note)
    if found:
        return found[0]
    for name, parameter in reversed(list(flow.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return None

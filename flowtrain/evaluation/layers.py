"""Looking inside a flow while it runs, with hooks that are gone afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowtrain.bijections import (
    Bijection,
    CheckerboardCoupling,
    DiagonalAffine,
    Sequential,
    Transform,
)
from flowtrain.bijections.fused import layer_by_layer
from flowtrain.flow.flow import Flow

Hook = Callable[[str, nn.Module, Any], None]
Around = Callable[[str, Bijection, str, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def watching(flow: nn.Module, hook: Hook) -> Iterator[None]:
    """Calls `hook(name, module, output)` after each module's forward pass."""
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: hook(name, module, output)
        )
        for name, module in flow.named_modules()
    ]
    try:
        with layer_by_layer():
            yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(flow: Flow) -> dict[str, Bijection]:
    """The layers of a flow by name, in its order: bijections that are not made of others, nor part
    of a conditioner.
    """
    return {short_name(name): layer for name, layer in _layers(flow, "", False)}


def _layers(module: nn.Module, prefix: str, within: bool) -> list[tuple[str, Bijection]]:
    within = within or isinstance(module, Bijection)
    found = [
        layer
        for name, part in module.named_children()
        # Another kind of module in a bijection is a conditioner: its ActNorms run forwards in both
        # directions.
        if not within or isinstance(part, Bijection | nn.ModuleList | nn.ModuleDict)
        for layer in _layers(part, f"{prefix}{name}.", within)
    ]
    if found or not isinstance(module, Bijection) or isinstance(module, Sequential):
        return found
    return [(prefix[:-1], module)]


def short_name(name: str) -> str:
    """A module's name in messages and metrics: that of the bijection's parts is their name in
    it.
    """
    return name.removeprefix("bijection.")


@contextlib.contextmanager
def around_layers(flow: Flow, around: Around) -> Iterator[None]:
    """Has `around(name, layer, direction, input, context)` called in place of each layer, for
    either direction.

    It gives the layer's result, which it may have from `call(layer, direction, input, context)`.
    """
    layers = layers_of(flow)
    for name, layer in layers.items():
        for direction in ("forward", "inverse"):
            # On the instance: hooks of torch see `forward` alone.
            setattr(layer, direction, partial(_around, around, name, layer, direction))
    try:
        with layer_by_layer():
            yield
    finally:
        for layer in layers.values():
            del layer.forward, layer.inverse


def _around(
    around: Around,
    name: str,
    layer: Bijection,
    direction: str,
    x: Tensor,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return around(name, layer, direction, x, context)


def call(
    layer: Bijection, direction: str, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A layer's own `forward` or `inverse`, also within `around_layers`."""
    return getattr(type(layer), direction)(layer, x, context)


@torch.no_grad()
def log_scale_ranges(flow: Flow, x: Tensor, noise: Tensor) -> dict[str, tuple[float, float]]:
    """The smallest and largest log-scale of each layer: parameters, and on a batch those that
    couplings predict.
    """
    ranges: dict[str, tuple[float, float]] = {}
    checkerboards = {m.transform: m for m in flow.modules() if isinstance(m, CheckerboardCoupling)}

    def hook(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, Transform):
            log_scale = (
                checkerboards[module].of_changed(output[1])
                if module in checkerboards
                else output[1]
            )
        elif isinstance(module, DiagonalAffine):
            log_scale = module.bounded_log_scale()
        else:
            return
        if log_scale.numel():  # else a checkerboard that keeps all of an image of one pixel
            ranges[short_name(name)] = (log_scale.min().item(), log_scale.max().item())

    with watching(flow, hook):
        flow(x, noise)
    return ranges


def first_non_finite(flow: Flow, x: Tensor, noise: Tensor) -> str | None:
    """Names the first layer with a value that is not finite: a parameter, an output, or else a
    gradient.

    Gradients travel from the last layer to the first, so of those the last in the forward order is
    named: they are what the failed step left.
    """
    for name, parameter in flow.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []

    def hook(name: str, module: nn.Module, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not found and not all(torch.isfinite(t).all() for t in tensors):
            found.append(f"output of {name or 'the flow'}")

    with torch.no_grad(), watching(flow, hook):
        flow(x, noise)
    if found:
        return found[0]
    for name, parameter in reversed(list(flow.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return None

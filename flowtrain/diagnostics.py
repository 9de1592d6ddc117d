"""Looking inside a flow while it runs, with hooks that are gone afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections import DiagonalAffine, Transform
from flowtrain.bijections.fused import layer_by_layer
from flowtrain.flow import Flow

Hook = Callable[[str, nn.Module, Any], None]


@contextlib.contextmanager
def watching(flow: nn.Module, hook: Hook) -> Iterator[None]:
    """Calls `hook(name, module, output)` after each module's forward pass."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, module, output))
        for name, module in flow.named_modules()
    ]
    try:
        with layer_by_layer():
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def log_scale_ranges(flow: Flow, x: Tensor, noise: Tensor) -> dict[str, tuple[float, float]]:
    """The smallest and largest log-scale of each layer: parameters, and on a batch those that couplings predict."""
    ranges: dict[str, tuple[float, float]] = {}

    def hook(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, Transform):
            log_scale = output[1]
        elif isinstance(module, DiagonalAffine):
            log_scale = module.bounded_log_scale()
        else:
            return
        ranges[name.removeprefix("bijection.")] = (log_scale.min().item(), log_scale.max().item())

    with watching(flow, hook):
        flow(x, noise)
    return ranges


def first_non_finite(flow: Flow, x: Tensor, noise: Tensor) -> str | None:
    """Names the first layer with a value that is not finite: a parameter, an output, or else a gradient.

    Gradients travel from the last layer to the first, so of those the last in the forward order is named: they are
    what the failed step left.
    """
    for name, parameter in flow.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []

    def hook(name: str, module: nn.Module, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output
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

"""`train.memory`: what a backward pass keeps of the forward pass through a chain of bijections.

`store` keeps all activations, as autograd does. `checkpoint` keeps the input of each layer and
computes the rest again (Chen et al. 2016). `reversible` keeps the last output alone and computes
everything again from it by the inverse (Gomez et al. 2017; Kingma & Dhariwal 2018, section 1), so
that the memory does not grow with the number of layers.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from flowtrain.bijections.base import Bijection

Mode = Literal["store", "checkpoint", "reversible"]

_mode: ContextVar[Mode] = ContextVar("mode", default="store")


@contextlib.contextmanager
def memory_mode(mode: Mode) -> Iterator[None]:
    """A context, like autocast: it belongs to a computation, not to a model."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def wants_gradient() -> bool:
    """Whether a gradient is recorded, or is to be computed later by running this again."""
    return torch.is_grad_enabled() or _mode.get() != "store"


def apply(
    layers: "Sequence[Bijection]", x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The layers one after the other, and the sum of their log-determinants, `(B,)` in nats."""
    if not layers or _mode.get() == "store" or not torch.is_grad_enabled():
        return _in_order(layers, x, context)
    tensors = [layer.tensors() for layer in layers]
    return _Recomputed.apply(
        layers, tensors, _mode.get() == "reversible", x, context, *itertools.chain(*tensors)
    )


def _in_order(
    layers: "Sequence[Bijection]", x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.shape[0])
    for layer in layers:
        x, log_det = layer(x, context)
        total = total + log_det
    return x, total


class _Recomputed(torch.autograd.Function):
    """A chain whose activations are computed again, layer by layer, in the backward pass.

    Every tensor that needs a gradient is an argument, so that to the rest of autograd this is one
    operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: "Sequence[Bijection]",
        tensors: Sequence[list[Tensor]],  # of each layer, what needs a gradient
        reversible: bool,
        x: Tensor,
        context: Tensor | None,
        *_tensors: Tensor,  # the same, one after the other, for autograd to see
    ) -> tuple[Tensor, Tensor]:
        ctx.chain = list(zip(layers, tensors, strict=True))
        ctx.reversible = reversible
        kind = x.device.type
        # no cache
        ctx.autocast = (
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            False,
        )
        total = x.new_zeros(x.shape[0])
        inputs = []
        for layer in layers:
            if not reversible:
                inputs.append(x)
            x, log_det = layer(x, context)
            total = total + log_det
        ctx.save_for_backward(context, *([x] if reversible else inputs))
        return x, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.chain is None:
            raise RuntimeError(
                "train.memory: activations are computed again for one backward pass, not a second "
                "time"
            )
        context, *kept = ctx.saved_tensors
        # What layers hold for this call (the matrices of many of them) goes when they are done
        # with, as activations do.
        chain, ctx.chain = ctx.chain, None
        wants_context = ctx.needs_input_grad[4]
        if wants_context:
            context = context.detach().requires_grad_()
        grad_context: Tensor | None = None
        grad_tensors: list[Tensor | None] = []
        z = kept[-1]
        # Autograd has a thread of its own for a GPU, to which the context of the forward pass does
        # not extend.
        mode: Mode = "reversible" if ctx.reversible else "checkpoint"
        with torch.enable_grad(), torch.autocast(*ctx.autocast), memory_mode(mode):
            for layer, tensors in reversed(chain):
                if ctx.reversible:
                    x, *outputs = layer.reconstruct(z, context)
                else:
                    x = kept.pop().detach().requires_grad_()
                    outputs = layer(x, context)
                # A log-determinant that is constant has no graph.
                given = [
                    (y, g)
                    for y, g in zip(outputs, (grad_z, grad_log_det), strict=True)
                    if y.requires_grad
                ]
                wanted = [x, *tensors, context] if wants_context else [x, *tensors]
                ys, gs = zip(*given, strict=True)
                grad_z, *grads = torch.autograd.grad(ys, wanted, gs, allow_unused=True)
                if wants_context and (grad := grads.pop()) is not None:
                    grad_context = grad if grad_context is None else grad_context + grad
                grad_tensors[:0] = grads
                z = x.detach()
        return None, None, None, grad_z, grad_context, *grad_tensors

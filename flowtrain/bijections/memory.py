"""`train.memory`: what the forward pass through a chain of bijections keeps for the backward pass.

- `store` keeps all activations, as autograd does.
- `checkpoint` keeps the input of each layer and computes the rest again (Chen et al. 2016).
- `reversible` keeps only the last output and computes everything again from it by the inverse
  (Gomez et al. 2017; Kingma & Dhariwal 2018, section 1). The memory does not grow with the number
  of layers.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.base import Bijection, Direction
from flowtrain.bijections.execution import FUSED, Executor

Mode = Literal["store", "checkpoint", "reversible"]


def executor_of(mode: Mode) -> Executor:
    """The executor of a memory mode, for `Flow.forward` in training."""
    return FUSED if mode == "store" else Recomputing(reversible=mode == "reversible")


class Recomputing(Executor):
    """Computes the activations of each chain again in the backward pass."""

    def __init__(self, reversible: bool):
        self.reversible = reversible

    def chain(
        self, layers: Sequence[Bijection], direction: Direction, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "inverse" or not layers or not torch.is_grad_enabled():
            return super().chain(layers, direction, x, context)
        called = self.prepared(layers)
        tensors = [layer.tensors() for layer in called]
        everything = itertools.chain(*tensors)
        result: tuple[Tensor, Tensor] = _Recomputed.apply(
            called, tensors, self.reversible, x, context, *everything
        )
        return result


class _Recomputed(torch.autograd.Function):
    """A chain whose activations are computed again, layer by layer, in the backward pass.

    Every tensor that needs a gradient is an argument, so autograd sees the chain as one operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[Bijection],
        tensors: Sequence[list[Tensor]],  # those of each layer that need a gradient
        reversible: bool,
        x: Tensor,
        context: Tensor | None,
        *_tensors: Tensor,  # the same ones as arguments, for autograd to see
    ) -> tuple[Tensor, Tensor]:
        ctx.chain = list(zip(layers, tensors, strict=True))
        ctx.reversible = reversible
        kind = x.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = kind, dtype, enabled, False  # False: no cache of cast weights
        total = x.new_zeros(x.shape[0])
        inputs = []
        for layer in layers:
            if not reversible:
                inputs.append(x)
            # With gradients, as in the backward pass: without, `Continuous` has other tolerances.
            with torch.enable_grad():
                x, log_det = layer(x.detach(), context)
            x, total = x.detach(), total + log_det.detach()
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
        # Fused layers hold matrices for this call. They are freed with the layers.
        chain, ctx.chain = ctx.chain, None
        wants_context = ctx.needs_input_grad[4]
        if wants_context:
            context = context.detach().requires_grad_()
        grad_context: Tensor | None = None
        grad_tensors: list[Tensor | None] = []
        z = kept[-1]
        # For a GPU, autograd runs this in its own thread, where autocast is off.
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for layer, tensors in reversed(chain):
                if ctx.reversible:
                    x, *outputs = layer.reconstruct(z, context)
                else:
                    x = kept.pop().detach().requires_grad_()
                    outputs = layer(x, context)
                # A constant log-determinant has no graph.
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

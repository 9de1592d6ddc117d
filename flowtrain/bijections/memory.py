"""`train.memory`: what a backward pass keeps of the forward pass through a chain of bijections.

- `store` keeps all activations, as autograd does.
- `checkpoint` keeps the input of each layer and computes the rest again (Chen et al. 2016).
- `reversible` keeps the last output alone and computes everything again from it by the inverse
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
from flowtrain.bijections.fused import fuse

Mode = Literal["store", "checkpoint", "reversible"]


def executor_of(mode: Mode) -> Executor:
    """The executor of a memory mode, for `Flow.forward` in training."""
    return FUSED if mode == "store" else Recomputing(reversible=mode == "reversible")


class Recomputing(Executor):
    """Computes the activations of each chain again in the backward pass."""

    def __init__(self, reversible: bool):
        self.reversible = reversible

    def chain(
        self,
        layers: Sequence[Bijection],
        direction: Direction,
        x: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if direction == "inverse" or not layers or not torch.is_grad_enabled():
            return super().chain(layers, direction, x, context)
        fused = fuse(layers)
        tensors = [layer.tensors() for layer in fused]
        everything = itertools.chain(*tensors)
        return _Recomputed.apply(fused, tensors, self.reversible, x, context, *everything)


class _Recomputed(torch.autograd.Function):
    """A chain whose activations are computed again, layer by layer, in the backward pass.

    Every tensor that needs a gradient is an argument. So the chain is one operation to autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[Bijection],
        tensors: Sequence[list[Tensor]],  # those of each layer that need a gradient
        reversible: bool,
        x: Tensor,
        context: Tensor | None,
        *_tensors: Tensor,  # the same ones in one row, for autograd to see
    ) -> tuple[Tensor, Tensor]:
        ctx.chain = list(zip(layers, tensors, strict=True))
        ctx.reversible = reversible
        kind = x.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = kind, dtype, enabled, False  # without a cache
        total = x.new_zeros(x.shape[0])
        inputs = []
        for layer in layers:
            if not reversible:
                inputs.append(x)
            # As in the backward pass: a continuous flow has other tolerances without gradients.
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
        # Layers may hold matrices for this call, which are freed with the layers.
        chain, ctx.chain = ctx.chain, None
        wants_context = ctx.needs_input_grad[4]
        if wants_context:
            context = context.detach().requires_grad_()
        grad_context: Tensor | None = None
        grad_tensors: list[Tensor | None] = []
        z = kept[-1]
        # Autograd has a thread of its own for a GPU, where the autocast of the forward pass is off.
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
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

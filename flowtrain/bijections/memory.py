"""`train.memory`: what the forward pass through a chain of bijections keeps for the backward pass.

- `store` keeps all activations, as autograd does.
- `checkpoint` keeps the input of each layer and computes the rest again (Chen et al. 2016).
- `reversible` keeps only the last output and computes everything again from it by the inverse
  (Gomez et al. 2017; Kingma & Dhariwal 2018, section 1). The memory does not grow with the number
  of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.execution import Call, Fused
from flowtrain.bijections.fused import fuse
from flowtrain.bijections.ordinal import OrdinalAutoregressive
from flowtrain.bijections.precision import full_precision

Mode = Literal["store", "checkpoint", "reversible"]


def directions_of(mode: Mode) -> list[Direction]:
    """The directions in which a training step calls the layers of a flow."""
    return ["forward", "inverse"] if mode == "reversible" else ["forward"]


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def call(
    layer: Bijection, direction: Direction, x: Tensor, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    """The layer's `forward`, with dropout, or its `inverse`."""
    if direction == "inverse":
        return layer.inverse(x, context)
    if isinstance(layer, OrdinalAutoregressive):
        return layer.forward(x, context, noise=x)
    return layer(x, context)


def likelihood(
    layer: OrdinalAutoregressive, direction: Direction, x: Tensor, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    return layer.likelihood(x, unguided(context), noise=x)


def executor_of(
    mode: Mode,
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] = unchanged,
    latents: bool = True,
) -> Executor:
    """The executor of a memory mode, for `Flow.forward` in training.

    `compiler` compiles the functions that compute a single layer, their first argument. Without
    `latents`, the only layer is a model of levels, whose likelihood needs none.
    """
    if mode == "store" or not latents:
        executor = Fused()
        executor.call = compiler(call if latents else likelihood)
        return executor
    return Recomputing(mode, compiler(call), compiler(gradient_of_layer))


class Recomputing(Fused):
    """Computes the activations of each chain again in the backward pass.

    `gradient` is `gradient_of_layer`, or the same function compiled.
    """

    def __init__(self, mode: Mode, call: Call, gradient: Callable[..., Any]):
        self.mode, self.call, self.gradient = mode, call, gradient

    def chain(
        self, layers: Sequence[Bijection], direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "inverse" or not layers or not torch.is_grad_enabled():
            return super().chain(layers, direction, x, context)
        context = unguided(context)
        called = fuse(layers, *directions_of(self.mode))
        tensors = [tensor for layer in called for tensor in layer.tensors()]
        result: tuple[Tensor, Tensor] = _Recomputed.apply(self, called, x, context, *tensors)
        return result


class _Recomputed(torch.autograd.Function):
    """A chain as one operation of autograd: tensors that need a gradient are its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: Recomputing,
        layers: Sequence[Bijection],
        x: Tensor,
        context: Tensor | None,
        *_tensors: Tensor,  # of the layers
    ) -> tuple[Tensor, Tensor]:
        ctx.executor, ctx.layers = executor, layers
        kind = x.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = kind, dtype, enabled, False  # False: no cache of cast weights
        total = x.new_zeros(x.shape[0])
        inputs = []
        for layer in layers:
            if executor.mode == "checkpoint":
                inputs.append(x)
            # With gradients, as in the backward pass: without, `Continuous` has other tolerances.
            with torch.enable_grad():
                x, log_det = executor.call(layer, "forward", x.detach(), context)
            x, total = x.detach(), total + log_det.detach()
        ctx.save_for_backward(context, *(inputs or [x]))
        return x, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        context, *kept = ctx.saved_tensors
        reversible = ctx.executor.mode == "reversible"
        wants_context = ctx.needs_input_grad[3]
        grad_context: Tensor | None = None
        grad_tensors: list[Tensor | None] = []
        given = kept[-1]
        # For a GPU, autograd runs this in its own thread, where autocast is off.
        with torch.autocast(*ctx.autocast):
            for layer in reversed(ctx.layers):
                if not reversible:
                    given = kept.pop()
                # Detached, because a saved output needs a gradient and others do not. Compiled code
                # would differ.
                given, grad_z, grad, grads = ctx.executor.gradient(
                    layer, reversible, given.detach(), context, grad_z, grad_log_det, wants_context
                )
                if grad is not None:
                    grad_context = grad if grad_context is None else grad_context + grad
                grad_tensors[:0] = grads
        return None, None, grad_z, grad_context, *grad_tensors


def gradient_of_layer(
    layer: Bijection,
    reversible: bool,
    given: Tensor,
    context: Tensor | None,
    grad_z: Tensor,
    grad_log_det: Tensor,
    wants_context: bool,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """The gradient of one layer, from its input, or from its output if it is `reversible`.

    Returns its input, and the gradients of the input, the context if wanted, and its `tensors()`.
    """
    with torch.enable_grad():
        leaf = given.detach().requires_grad_()
        if wants_context:
            assert context is not None
            context = context.detach().requires_grad_()
        if reversible:
            x, *results = layer.reconstruct(leaf, context)
            inputs = [x, leaf]
        else:
            x, results = leaf, list(call(layer, "forward", leaf, context))
            inputs = [leaf]
        # A constant log-determinant has no graph.
        pairs = [
            (y, grad)
            for y, grad in zip(results, (grad_z, grad_log_det), strict=True)
            if y.requires_grad
        ]
        if wants_context:
            assert context is not None
            inputs.append(context)
        ys, grad_ys = zip(*pairs, strict=True)
        wanted = [*inputs, *layer.tensors()]
        with full_precision(given):  # for the products of the data path, as in `store`
            grad_x, *others = torch.autograd.grad(ys, wanted, grad_ys, allow_unused=True)
    grads: list[Tensor | None] = list(others)
    if reversible and (of_leaf := grads.pop(0)) is not None:
        grad_x = grad_x + of_leaf
    grad_context = grads.pop(0) if wants_context else None
    return x.detach(), grad_x, grad_context, grads

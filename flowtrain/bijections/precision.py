"""The border between the data path and the conditioners: precision and order in memory.

The data path is float32 (or float64), with the channels of an image apart (NCHW), so that the
halves of a coupling are contiguous. Conditioners run in bf16 under autocast, and convolutions
are fastest with the channels last in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.context import Context, Guided


def apply_conditioner(
    net: Callable[..., Tensor], x: Tensor, context: Context | None = None
) -> Tensor:
    """`net(x, context)`, across the border and back: in the precision of `x`, channels apart.

    A guided context gives the parameters of its two contexts, extrapolated.
    """
    if isinstance(context, Guided):
        given = apply_conditioner(net, x, context.given)
        return context.extrapolated(given, apply_conditioner(net, x, context.without))
    parameters: Tensor = _Cast.apply(inside(net, x, context), x.dtype, False)
    return parameters


def inside(net: Callable[..., Tensor], x: Tensor, context: Tensor | None) -> Tensor:
    """`net(x, context)`, across the border, without the way back."""
    return net(into_conditioner(x), None if context is None else into_conditioner(context))


def into_conditioner(x: Tensor) -> Tensor:
    """An image in the precision of autocast, with the channels last. Vectors stay as they are,
    because autocast casts them where a linear layer multiplies.
    """
    if x.ndim != 4:
        return x
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    inside: Tensor = _Cast.apply(x, dtype, True)
    return inside


class _Cast(torch.autograd.Function):
    """Changes precision and order in memory, and changes them back for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
        ctx.back = x.dtype, x.ndim == 4 and not channels_last
        return _cast(x, dtype, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _cast(grad, *ctx.back), None, None


def _cast(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # Two passes, which move the entries in the narrower precision, are faster than one for both.
    if dtype.itemsize < x.dtype.itemsize:
        x = x.to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
    return x.to(dtype)


def full_precision(x: Tensor) -> torch.autocast:
    """Turns autocast off on the device of `x`: low precision would cost likelihood."""
    return torch.autocast(x.device.type, enabled=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors whose type is not named get this one meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def has_float64(x: Tensor) -> bool:
    """Whether the device of `x` computes in double precision, which Apple's GPUs do not."""
    return x.device.type != "mps"

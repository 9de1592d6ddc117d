"""The border between the data path and the conditioners: another precision, and another order in
memory.

Data paths are float32 (or float64) with an image's channels apart (NCHW), so that the halves of a
coupling are contiguous. Conditioners, under autocast in bf16, are convolutions, which are fastest
with the channels last.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def conditioner_input(x: Tensor) -> Tensor:
    """`x` in autocast's precision, if it is on, and with the channels last, if it is `(B, C, H,
    W)`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Cast.apply(x, dtype, x.ndim == 4)


def conditioner_output(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Back on the data path: in its precision, and with the channels apart."""
    return _Cast.apply(x, dtype, False)


class _Cast(torch.autograd.Function):
    """Precision and order in memory, of the value and, the other way round, of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
        ctx.back = x.dtype, x.ndim == 4 and not channels_last
        return _cast(x, dtype, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _cast(grad, *ctx.back), None, None


def _cast(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # The entries are moved in the narrower precision: two passes, which are faster than one that
    # does both.
    if dtype.itemsize < x.dtype.itemsize:
        x = x.to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
    return x.to(dtype)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast: in low precision the products of the data path cost likelihood."""
    return torch.autocast(x.device.type, enabled=False)

"""Invertible maps of whole numbers, which borrow bits from a stack and pay them back.

All values are int64, in units of `2**-bits`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.compression.stack import Stack

PARTS_OF_LAYER = 4  # in which a layer's entries are coded
CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units


def whole(x: Tensor, bits: int) -> Tensor:
    """Real numbers to whole numbers of units."""
    return torch.round(x * 2**bits).long()


def scale(x: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """`x * numerator / denominator` as a bijection (Zhang et al. 2021, algorithm 1).

    All tensors have one shape, `(B, ...)`.
    """
    parts: list[Tensor] = []
    for x_, n, d in _parts(x, numerator, denominator):
        y = x_ * n + stack.pop(n)
        parts.append(y.div(d, rounding_mode="floor"))
        stack.push(y - parts[-1] * d, d)
    return torch.cat(parts, dim=1).view_as(x)


def unscale(z: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """The inverse of `scale`."""
    parts: list[Tensor] = []
    for z_, n, d in reversed(_parts(z, numerator, denominator)):
        y = z_ * d + stack.pop(d)
        parts.append(y.div(n, rounding_mode="floor"))
        stack.push(y - parts[-1] * n, n)
    return torch.cat(parts[::-1], dim=1).view_as(z)


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """A few entries at a time, so that fewer bits are borrowed at any moment."""
    return list(zip(*(t.flatten(1).chunk(PARTS_OF_LAYER, dim=1) for t in tensors), strict=True))


class Monotone:
    """An increasing map of one entry, made linear within cells of `2**CELL_BITS` units.

    The lower edge of cell number b is mapped to `function(edge)`, rounded, plus b units. So no cell
    becomes empty, however flat the function is, and the slope is larger by `2**-CELL_BITS`.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], bits: int
    ):
        self.function = function
        self.approximate_inverse = inverse
        self.bits = bits

    def _edge(self, cell: Tensor) -> Tensor:
        edge = cell.double() * 2.0 ** (CELL_BITS - self.bits)
        return whole(self.function(edge), self.bits) + cell

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        cell = x >> CELL_BITS
        lower, upper = self._edge(cell), self._edge(cell + 1)
        width = torch.full_like(x, 2**CELL_BITS)
        return lower + scale(x - (cell << CELL_BITS), upper - lower, width, stack)

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        # Without the slope that was added, x would be `end`; with it, x is between there and zero.
        end = self.approximate_inverse(z.double() * 2.0**-self.bits)
        end = end * 2.0 ** (self.bits - CELL_BITS)
        low, high = end.clamp(max=0).floor().long() - 2, end.clamp(min=0).ceil().long() + 2
        while (high - low > 1).any():
            middle = (low + high) >> 1
            below = self._edge(middle) <= z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        lower, upper = self._edge(low), self._edge(low + 1)
        width = torch.full_like(z, 2**CELL_BITS)
        return (low << CELL_BITS) + unscale(z - lower, upper - lower, width, stack)

"""A stack of bits, and maps of whole numbers that borrow from it and pay back.

All values are whole numbers, int64, in units of `2**-bits`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import RunError, UserError

CELL_BITS = 10  # a nonlinear map is linear within cells of 2**10 units
NORMAL_CELLS = 32  # in a standard deviation of a normal distribution, within which it is uniform
LARGEST_SIZE = 2**24
PARTS_OF_LAYER = 4  # in which its entries are coded
ENOUGH = 64  # bits that are never taken off the stack


class Uncodable(RunError):
    """Some images of a batch are out of the coder's range: `images`, bool `(B,)`."""

    def __init__(self, images: Tensor):
        super().__init__(f"{int(images.sum())} images are out of range")
        self.images = images


class Exhausted(RunError):
    """There are not enough bits on the stack to borrow from."""

    def __init__(self) -> None:
        super().__init__("there are not enough bits to borrow from")


def constriction() -> Any:
    """The entropy coder's package. Raises `UserError` where it is not installed."""
    try:
        import constriction  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            "compression needs the package constriction: pip install 'flowtrain[compress]'"
        ) from None
    return constriction


class Stack:
    """A stack of bits: an ANS coder (Duda 2013; `constriction`) that starts with `words`, uint32.

    To pop a symbol that was never pushed draws it from its distribution, and pushing it again puts
    the bits back. With `again`, the words are what `words()` of another stack has given; otherwise
    any.
    """

    def __init__(self, words: np.ndarray, again: bool = False):
        stream = constriction().stream
        self.coder = stream.stack.AnsCoder(words, seal=not again)
        self.uniform = stream.model.Uniform()
        self.gaussian = stream.model.QuantizedGaussian
        self.lowest = self.bits  # the least number of bits that there were

    @property
    def bits(self) -> int:
        return self.coder.num_valid_bits()

    def words(self) -> np.ndarray:
        """All that is on the stack now, uint32."""
        return self.coder.get_compressed()

    def first_words(self) -> np.ndarray:
        """The words that the first stack began with, once all else is popped. Raises `ValueError`
        if it is not.
        """
        return self.coder.get_compressed(unseal=True)

    def copy(self) -> "Stack":
        other = copy.copy(self)
        other.coder = self.coder.clone()
        return other

    def pop(self, sizes: Tensor) -> Tensor:
        """Uniform whole numbers in `[0, sizes)`, of its shape, `(B, ...)`. Raises `Uncodable`,
        `Exhausted`.
        """
        sizes, real = _sizes(sizes)
        values = torch.zeros_like(sizes)
        values[real] = torch.from_numpy(self.coder.decode(self.uniform, _int32(sizes[real]))).long()
        self._popped()
        return values

    def push(self, values: Tensor, sizes: Tensor) -> None:
        """The inverse of `pop`."""
        sizes, real = _sizes(sizes)
        self.coder.encode_reverse(_int32(values[real]), self.uniform, _int32(sizes[real]))

    def pop_normal(self, shape: tuple[int, ...], bits: int, reach: int) -> Tensor:
        """Standard normal numbers, `shape`, in units of `2**-bits`, none further out than
        `reach`.
        """
        cells = (
            torch.from_numpy(self.coder.decode(self._normal(reach), math.prod(shape)))
            .long()
            .view(shape)
        )
        size = torch.full(shape, 2**bits // NORMAL_CELLS)
        return cells * size + self.pop(size)

    def push_normal(self, z: Tensor, bits: int, reach: int) -> None:
        """The inverse of `pop_normal`. Raises `Uncodable` beyond `reach`."""
        size = torch.full_like(z, 2**bits // NORMAL_CELLS)
        cells = z.div(size, rounding_mode="floor")
        require((cells >= -NORMAL_CELLS * reach) & (cells < NORMAL_CELLS * reach))
        self.push(z - cells * size, size)
        self.coder.encode_reverse(_int32(cells.flatten()), self._normal(reach))

    def _normal(self, reach: int) -> Any:
        # A cell's number stands for its lower edge, hence the half.
        return self.gaussian(
            -NORMAL_CELLS * reach, NORMAL_CELLS * reach - 1, -0.5, float(NORMAL_CELLS)
        )

    def _popped(self) -> None:
        self.lowest = min(self.lowest, self.bits)
        if self.lowest < ENOUGH:
            raise Exhausted


def _sizes(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The sizes, and which of them take any bits: a symbol of one value is not coded."""
    require((sizes >= 1) & (sizes <= LARGEST_SIZE))
    return sizes, sizes > 1


def require(fine: Tensor) -> None:
    bad = ~fine.flatten(1).all(dim=1)
    if bad.any():
        raise Uncodable(bad)


def _int32(values: Tensor) -> np.ndarray:
    return values.to(torch.int32).numpy()


# --- one entry at a time --------------------------------------------------------------------------


def scale(x: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """`x * numerator / denominator` as a bijection (Zhang et al. 2021, algorithm 1): all `(B, ...)`
    of one shape.
    """
    parts = []
    for x_, n, d in _parts(x, numerator, denominator):
        y = x_ * n + stack.pop(n)
        parts.append(y.div(d, rounding_mode="floor"))
        stack.push(y - parts[-1] * d, d)
    return torch.cat(parts, dim=1).view_as(x)


def unscale(z: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """The inverse of `scale`."""
    parts = []
    for z_, n, d in reversed(_parts(z, numerator, denominator)):
        y = z_ * d + stack.pop(d)
        parts.append(y.div(n, rounding_mode="floor"))
        stack.push(y - parts[-1] * n, n)
    return torch.cat(parts[::-1], dim=1).view_as(z)


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """A few entries after the other: so that what is only borrowed for a moment is less."""
    return list(zip(*(t.flatten(1).chunk(PARTS_OF_LAYER, dim=1) for t in tensors), strict=True))


def whole(x: Tensor, bits: int) -> Tensor:
    return (x * 2**bits).round().long()


class Monotone:
    """An increasing map of one entry, made linear within cells of `2**CELL_BITS` units.

    A cell's lower edge, number `b`, is mapped to `f(edge)`, rounded, plus b units: so no cell
    becomes empty, however flat f is, and the slope is larger by `2**-CELL_BITS`.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], bits: int
    ):
        self.function = function
        self.approximate_inverse = inverse
        self.bits = bits

    def _edge(self, cell: Tensor) -> Tensor:
        return (
            whole(self.function(cell.double() * 2.0 ** (CELL_BITS - self.bits)), self.bits) + cell
        )

    def forward(self, x: Tensor, stack: Stack) -> Tensor:
        cell = x >> CELL_BITS
        lower, upper = self._edge(cell), self._edge(cell + 1)
        width = torch.full_like(x, 2**CELL_BITS)
        return lower + scale(x - (cell << CELL_BITS), upper - lower, width, stack)

    def inverse(self, z: Tensor, stack: Stack) -> Tensor:
        # Without the slope that was added x would be `end`; with it, it is between there and zero.
        end = self.approximate_inverse(z.double() * 2.0**-self.bits) * 2.0 ** (
            self.bits - CELL_BITS
        )
        low, high = end.clamp(max=0).floor().long() - 2, end.clamp(min=0).ceil().long() + 2
        while (high - low > 1).any():
            middle = (low + high) >> 1
            below = self._edge(middle) <= z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        lower, upper = self._edge(low), self._edge(low + 1)
        width = torch.full_like(z, 2**CELL_BITS)
        return (low << CELL_BITS) + unscale(z - lower, upper - lower, width, stack)

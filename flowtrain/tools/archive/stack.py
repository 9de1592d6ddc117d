"""A stack of bits, and how whole numbers are scaled by borrowing from it and paying back."""

import copy
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import RunError
from flowtrain.system import packages

RESERVE = 64  # bits that are never taken off the stack
LARGEST_SIZE = 2**24  # of the range of one uniform symbol
PARTS_OF_LAYER = 4  # in which a layer's entries are coded
NORMAL_CELLS = 32  # per standard deviation of a normal distribution, which is uniform within a cell


class Uncodable(RunError):
    """Some images of a batch are out of the coder's range: `images`, bool `(B,)`."""

    def __init__(self, images: Tensor):
        super().__init__(f"{int(images.sum())} images are out of range")
        self.images = images


class Exhausted(RunError):
    """There are not enough bits on the stack to borrow from."""


def require(fine: Tensor) -> None:
    """Raises `Uncodable` for the images with a false entry in `fine`, `(B, ...)`."""
    bad = ~fine.flatten(1).all(dim=1)
    if bad.any():
        raise Uncodable(bad)


def constriction() -> ModuleType:
    """The package with the entropy coder. Raises `UserError` if it is not installed."""
    try:
        import constriction  # type: ignore[import-untyped]
    except ImportError:
        raise packages.missing("compression", "constriction", extra="compress") from None
    module: ModuleType = constriction
    return module


class Stack:
    """A stack of bits: an ANS coder (Duda 2013; `constriction`) that starts with `words`, uint32.

    To pop a symbol that was never pushed is to draw it from its distribution. Pushing it again puts
    the bits back. With `again`, the words must come from `words()` of another stack.
    """

    def __init__(self, words: np.ndarray, again: bool = False):
        stream = constriction().stream
        self.coder = stream.stack.AnsCoder(words, seal=not again)
        self.uniform = stream.model.Uniform()
        self.categorical = stream.model.Categorical(perfect=False)
        self.gaussian = stream.model.QuantizedGaussian
        self.lowest = self.bits  # the smallest number of bits so far

    @property
    def bits(self) -> int:
        return int(self.coder.num_valid_bits())

    def words(self) -> np.ndarray:
        """All that is on the stack now, uint32."""
        return np.asarray(self.coder.get_compressed())

    def first_words(self) -> np.ndarray:
        """The words that the first stack began with, once everything else is popped.

        Raises `ValueError` if something else is left.
        """
        return np.asarray(self.coder.get_compressed(unseal=True))

    def copy(self) -> "Stack":
        other = copy.copy(self)
        other.coder = self.coder.clone()
        return other

    def pop(self, sizes: Tensor) -> Tensor:
        """Uniform whole numbers in `[0, sizes)`, of the shape of `sizes`, `(B, ...)`.

        Raises `Uncodable` and `Exhausted`.
        """
        taken = _takes_bits(sizes)
        values = torch.zeros_like(sizes)
        popped = self.coder.decode(self.uniform, _int32(sizes[taken]))
        values[taken] = torch.from_numpy(popped).long()
        self.lowest = min(self.lowest, self.bits)
        if self.lowest < RESERVE:
            raise Exhausted("there are not enough bits to borrow from")
        return values

    def push(self, values: Tensor, sizes: Tensor) -> None:
        """The inverse of `pop`."""
        taken = _takes_bits(sizes)
        self.coder.encode_reverse(_int32(values[taken]), self.uniform, _int32(sizes[taken]))

    def pop_choice(self, probabilities: Tensor) -> Tensor:
        """Whole numbers `(B,)` below N of relative probabilities `(B, N)`, int64."""
        if probabilities.shape[1] == 1:
            return torch.zeros(len(probabilities), dtype=torch.long)
        popped = self.coder.decode(self.categorical, probabilities.numpy())
        return torch.from_numpy(popped).long()

    def push_choice(self, choice: Tensor, probabilities: Tensor) -> None:
        """The inverse of `pop_choice`. Raises `FloatingPointError` for NaN and infinity."""
        if probabilities.shape[1] == 1:
            return
        self.coder.encode_reverse(_int32(choice), self.categorical, finite(probabilities).numpy())

    def pop_normal(self, shape: tuple[int, ...], bits: int, reach: int) -> Tensor:
        """Standard normal numbers of a shape, in units of `2**-bits`, at most `reach` from zero."""
        cells = torch.from_numpy(self.coder.decode(self._normal(reach), math.prod(shape)))
        size = torch.full(shape, 2**bits // NORMAL_CELLS)
        return cells.long().view(shape) * size + self.pop(size)

    def push_normal(self, z: Tensor, bits: int, reach: int) -> None:
        """The inverse of `pop_normal`. Raises `Uncodable` for numbers beyond `reach`."""
        size = torch.full_like(z, 2**bits // NORMAL_CELLS)
        cells = z.div(size, rounding_mode="floor")
        require((cells >= -NORMAL_CELLS * reach) & (cells < NORMAL_CELLS * reach))
        self.push(z - cells * size, size)
        self.coder.encode_reverse(_int32(cells.flatten()), self._normal(reach))

    def _normal(self, reach: int) -> Any:
        # A cell's number stands for its lower edge, hence the half.
        lowest, highest = -NORMAL_CELLS * reach, NORMAL_CELLS * reach - 1
        return self.gaussian(lowest, highest, -0.5, float(NORMAL_CELLS))


def _takes_bits(sizes: Tensor) -> Tensor:
    """Which symbols of these sizes take bits: one with a single value is not coded."""
    require((sizes >= 1) & (sizes <= LARGEST_SIZE))
    return sizes > 1


def _int32(values: Tensor) -> np.ndarray:
    return values.to(torch.int32).numpy()


def random_words(count: int) -> np.ndarray:
    """Words for a stack, uint32 `(count,)`, always the same."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, 2**32, count, dtype=np.uint32)


def words_of(data: bytes) -> np.ndarray:
    """Words for a stack from bytes, four per word."""
    return np.frombuffer(data, "<u4").astype(np.uint32)


def finite(x: Tensor) -> Tensor:
    """x, or `FloatingPointError`: no whole number stands for a value that is not finite."""
    if not torch.isfinite(x).all():
        raise FloatingPointError("a weight, or what a network computes, is not finite")
    return x


def whole(x: Tensor, bits: int) -> Tensor:
    """Real numbers to whole numbers of units."""
    return torch.round(x * 2**bits).long()


def scale(x: Tensor, numerator: Tensor, denominator: Tensor, stack: Stack) -> Tensor:
    """`x * numerator / denominator` as a bijection (Zhang et al. 2021, algorithm 1).

    x is `(B, ...)`, and the others are broadcast.
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


def _parts(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """A few entries at a time, so that fewer bits are borrowed at any moment."""
    tensors = [x, *(other.expand_as(x) for other in others)]
    return list(zip(*(t.flatten(1).chunk(PARTS_OF_LAYER, dim=1) for t in tensors), strict=True))

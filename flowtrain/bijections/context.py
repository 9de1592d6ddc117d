"""The context of conditional layers, and classifier-free guidance by two of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Guided(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), as TarFlow uses it (Zhai et
    al. 2024, arXiv:2412.06329, section 3.4).

    What a network predicts is moved away from what it predicts without the class:

        p = p_without + (1 + weight) (p_given - p_without)

    Weight 0 is the model given the class. A layer passes this on to `apply_conditioner` like any
    context, and need not know of it. Its two directions stay inverse to each other.

    given, without: What networks see of the class, and what they see where there is none. Both have
        the shape of a context, for the same examples.
    weight: That of all parameters.
    """

    given: Tensor
    without: Tensor
    weight: float

    def extrapolated(self, given: Tensor, without: Tensor) -> Tensor:
        """p, from what a network predicts in the two contexts."""
        return given + self.weight * (given - without)

    def of(self, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """p, from a function that predicts it in a context."""
        return self.extrapolated(predict(self.given), predict(self.without))

    def in_order(
        self,
        build: Callable[[Callable[[Tensor], Tensor], int, Tensor], Tensor],
        next_entry: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What an autoregressive network builds, entry by entry, with p in place of its parameters.

        `build(next_entry, batch, context)` builds `(B, ...)`, where `next_entry` turns parameters
        `(B, ...)` into entries. Both contexts are one batch, in which the entries are there twice.
        """
        count = len(self.given)

        def next_of_both(parameters: Tensor) -> Tensor:
            entry = next_entry(self.extrapolated(*parameters.tensor_split(2)))
            return torch.cat([entry, entry])

        return build(next_of_both, 2 * count, torch.cat([self.given, self.without]))[:count]

    def to(self, device: torch.device | str) -> "Guided":
        return self._replace(given=self.given.to(device), without=self.without.to(device))


# What a conditional layer may read beside its input: shape `(B, C', H, W)` or `(B, E)`.
Context = Tensor | Guided


def unguided(context: Context | None) -> Tensor | None:
    """A context where guidance has no meaning: it serves samples alone. Raises `TypeError`."""
    if isinstance(context, Guided):
        raise TypeError("guidance is for samples alone")
    return context

"""The context of conditional layers, and classifier-free guidance by two of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Guided(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), as TarFlow uses it (Zhai et
    al. 2024, arXiv:2412.06329, section 3.4).

    The prediction p of a network is moved away from the prediction without the class:

        p = p_without + (1 + weight) (p_given - p_without)

    Weight 0 is the model given the class. The directions of a layer stay inverse to each other.
    `given` and `without` are contexts of the same examples.
    """

    given: Tensor
    without: Tensor
    weight: float

    def extrapolated(self, given: Tensor, without: Tensor) -> Tensor:
        """p, from the predictions in the two contexts."""
        return given + self.weight * (given - without)

    def in_order(
        self,
        build: Callable[[Callable[[Tensor], Tensor], int, Tensor], Tensor],
        next_entry: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The result `(B, ...)` of `build(next_entry, batch, context)` with p as the parameters.

        `next_entry` turns parameters `(B, ...)` into entries. Both contexts are one batch of 2 B.
        """
        count = len(self.given)

        def next_of_both(parameters: Tensor) -> Tensor:
            entry = next_entry(self.extrapolated(*parameters.tensor_split(2)))
            return torch.cat([entry, entry])

        return build(next_of_both, 2 * count, torch.cat([self.given, self.without]))[:count]

    def to(self, device: torch.device | str) -> "Guided":
        return self._replace(given=self.given.to(device), without=self.without.to(device))


# Further input of conditional layers: shape `(B, C', H, W)` or `(B, E)`.
Context = Tensor | Guided


def unguided(context: Context | None) -> Tensor | None:
    """A context where guidance has no meaning: it serves samples alone. Raises `TypeError`."""
    if isinstance(context, Guided):
        raise TypeError("guidance is for samples alone")
    return context

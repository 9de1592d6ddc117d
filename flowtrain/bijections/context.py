"""The context of conditional layers, and classifier-free guidance by two of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Guidance(NamedTuple):
    """What is asked of `Guided`: its weight, and whether that grows along the tokens of a layer."""

    weight: float
    grows: bool = False


class Guided(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), as TarFlow uses it (Zhai et
    al. 2024, arXiv:2412.06329, section 3.4).

    What a network predicts is moved away from what it predicts without the class:

        p = p_without + (1 + weight) (p_given - p_without)

    Weight 0 is the model given the class. A layer passes this on to `apply_conditioner` like any
    context, and need not know of it. Its two directions stay inverse to each other.

    TarFlow's code can also let the weight grow along the T tokens of a layer, in the order in which
    the layer computes them: the parameters of token t = 0, ..., T - 1 get `weight t / (T - 1)`.
    Only a layer that is `guided_by_token` can do so: it asks `at_token` or `at_tokens`.

    given, without: What networks see of the class, and what they see where there is none. Both have
        the shape of a context, for the same examples.
    weight: One for all parameters, or one for each token, `(H, W)`.
    grows: Whether the weight grows along the tokens of a layer.
    """

    given: Tensor
    without: Tensor
    weight: float | Tensor
    grows: bool = False

    def extrapolated(self, given: Tensor, without: Tensor) -> Tensor:
        """p, from what a network predicts in the two contexts.

        Raises `TypeError` for a weight that grows, in a layer that has not asked at which token.
        """
        if self.grows:
            raise TypeError("guidance grows along tokens, and the layer has none in an order")
        return given + self.weight * (given - without)

    def at_token(self, token: int, tokens: int) -> "Guided":
        """What holds at one of a layer's `tokens`, the first of which is 0."""
        return self._weighted(token / max(1, tokens - 1))

    def at_tokens(self, x: Tensor) -> "Guided":
        """What holds at all tokens of `x` `(B, E, H, W)`, in raster order."""
        share = torch.linspace(0, 1, x.shape[2:].numel(), dtype=x.dtype, device=x.device)
        return self._weighted(share.view(x.shape[2:]))

    def _weighted(self, share: float | Tensor) -> "Guided":
        return Guided(self.given, self.without, self.weight * share) if self.grows else self

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


def at_tokens(context: Context | None, x: Tensor) -> Context | None:
    """The context of networks that predict parameters for all tokens of `x` `(B, E, H, W)`."""
    return context.at_tokens(x) if isinstance(context, Guided) else context


def unguided(context: Context | None) -> Tensor | None:
    """A context where guidance has no meaning: it serves samples alone. Raises `TypeError`."""
    if isinstance(context, Guided):
        raise TypeError("guidance is for samples alone")
    return context

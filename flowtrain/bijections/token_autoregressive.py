"""Autoregressive layers over tokens (TarFlow, Zhai et al. 2024, arXiv:2412.06329)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import sum_per_example
from flowtrain.bijections.context import Context, Guided
from flowtrain.bijections.precision import full_precision

# The parameters `(B, P E)` of the next token, given the token before it, `(B, E)`. The first token
# has none before it.
NextParameters = Callable[[Tensor | None], Tensor]


class TokenConditioner(nn.Module):
    """Maps tokens `(B, E, H, W)` to `(B, P E, H, W)`: P parameters for each of their E entries.

    The parameters of a token depend on earlier tokens in raster order, and on the context.
    """

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor: ...

    def by_token(self, batch: int, context: Tensor | None = None) -> NextParameters:
        """The same parameters, one token after the other."""
        raise NotImplementedError


class TokenAutoregressive(Autoregressive):
    """An autoregressive layer on tokens n of `(B, E, H, W)` (TarFlow, eq. 4-6, with an affine T).

    It takes the tokens in raster order. A `Reverse` before the layer gives the other order.
    """

    conditioner: TokenConditioner

    def count(self, x: Tensor) -> int:
        return x[0, 0].numel()

    def inverse(
        self,
        z: Tensor,
        context: Context | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []
        log_derivatives: list[Tensor] = []
        with full_precision(z):
            next_parameters = self._by_token(z, context)
            targets = z.flatten(2).unbind(dim=2)
            for target in targets:
                parameters = next_parameters(tokens[-1] if tokens else None)
                token, log_derivative = self.transform.inverse(target, parameters)
                tokens.append(token)
                log_derivatives.append(log_derivative)
                progress(len(tokens) / len(targets))
        x = torch.stack(tokens, dim=2).view(z.shape)
        return x, sum_per_example(torch.stack(log_derivatives, dim=2))

    def _by_token(self, z: Tensor, context: Context | None) -> NextParameters:
        if not isinstance(context, Guided):
            return self.conditioner.by_token(len(z), context)
        given = self.conditioner.by_token(len(z), context.given)
        without = self.conditioner.by_token(len(z), context.without)
        return lambda before: context.extrapolated(given(before), without(before))

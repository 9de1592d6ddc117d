"""Inverses of autoregressive layers by fixed-point iteration, all entries at once."""

from collections.abc import Callable

import torch
from torch import Tensor


def tolerance(x: Tensor) -> float:
    """By how much of 1 + |x| an entry may move and count as settled: 2.6e-5 in float32."""
    return float(4 * torch.finfo(x.dtype).eps ** 0.75)


def fixed_point(
    step: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    at_most: int,
    note: Callable[[float], None],
) -> tuple[Tensor, Tensor]:
    """Jacobi iteration: `x` with `step(x)[0] == x`, and `step(x)[1]`.

    `step` computes each part of an example from the parts before it (Song et al. 2021,
    arXiv:2002.03629; for TarFlow: Liu & Qin 2025, arXiv:2505.12849). So after k steps the first k
    parts are right, and `at_most` parts need no more steps than that. It ends sooner once no entry
    of any example moves by more than `tolerance`. `note` gets the share of the steps that are done.
    """
    x = start
    for done in range(1, at_most + 1):
        # A guess may overflow, and attention would spread what is not a number to all tokens.
        before = torch.nan_to_num(x, 0.0, 0.0, 0.0)
        x, result = step(before)
        note(done / at_most)
        if torch.allclose(x, before, tolerance(x), tolerance(x)):
            break
    return x, result

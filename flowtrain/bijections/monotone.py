"""Solving `f(x) = y` for many increasing functions of one variable at once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FREE_STEPS = 6  # before the width of the brackets matters; smooth equations need two to six

# Steps between two looks at whether all equations are solved. A look waits for the device, which
# costs nothing on a CPU alone. Further steps change no solved equation.
STEPS_OF_A_LOOK = {"cpu": 1}
STEPS_OF_A_LOOK_ELSEWHERE = 4


@torch.no_grad()
def solve_monotone(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> Tensor:
    """`x` with `f(x) = target`, elementwise, for increasing `f` and a solution in `[lower, upper]`.

    `function(x)` gives `f(x)` and `f'(x)`. All tensors have one shape. Newton's method starts at
    the middle of the bracket, which every value of `f` narrows. The next `x` is the bracket's
    middle if a step would leave the bracket, or if after k steps it is wider than
    `2^(-(k - FREE_STEPS) / 2)` of the first one. So no `f`, however flat or steep, takes more than
    `FREE_STEPS + 2 log2((upper - lower) / precision)` steps, about twice as many as bisection.

    Bisection ends at two roundings of `max(1, |x|)`. A Newton step is the last if it is shorter
    than a quarter of the square root of one such rounding. The error that it leaves is its square
    times `|f'' / 2 f'|`, a factor that should not be far above 10. If target, bracket or `f` is
    NaN, so is `x`. Not differentiable.
    """
    info = torch.finfo(target.dtype)
    eps, tiny = info.eps, info.tiny
    first_width = upper - lower

    def step(
        k: Any, x: Tensor, lower: Tensor, upper: Tensor, active: Tensor
    ) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        value, derivative = function(x)
        error = value - target
        lower = torch.where(error <= 0, x, lower)
        upper = torch.where(error >= 0, x, upper)
        width = upper - lower
        newton = x - error / derivative.clamp(min=tiny)
        bisect = (
            (newton < lower)
            | (newton > upper)
            | (width > first_width * 2 ** ((FREE_STEPS - k) / 2))
        )
        # NaN does not count as outside the bracket. It stays, and counts as converged.
        moved = torch.where(bisect, lower + width / 2, newton)
        scale = moved.abs().clamp(min=1)
        enough = torch.where(bisect, 2 * eps * scale, (eps * scale).sqrt() / 4)
        moved = torch.where(active, moved, x)
        return k + 1, moved, lower, upper, (moved - x).abs() > enough

    most = FREE_STEPS + 2 * math.ceil(math.log2(info.max) - math.log2(eps))
    x = lower + first_width / 2
    active = torch.ones_like(x, dtype=torch.bool)
    if torch.compiler.is_exporting():  # a graph has a loop of its own

        def goes_on(k: Tensor, *state: Tensor) -> Tensor:
            return (k < most) & state[-1].any()

        def copied(*state: Tensor) -> list[Tensor]:  # in one order in memory, as torch wants them
            return [each.clone(memory_format=torch.contiguous_format) for each in state]

        state = copied(torch.zeros((), dtype=torch.int64), x, lower, upper, active)
        result: Tensor = torch.while_loop(goes_on, lambda *state: copied(*step(*state)), state)[1]
        return result
    steps = STEPS_OF_A_LOOK.get(x.device.type, STEPS_OF_A_LOOK_ELSEWHERE)
    for k in range(most):
        _, x, lower, upper, active = step(k, x, lower, upper, active)
        if (k + 1) % steps == 0 and not active.any():
            break
    return x

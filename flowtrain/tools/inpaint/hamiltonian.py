"""Hamiltonian Monte Carlo for many chains at once (Duane et al. 1987; Neal 2011, arXiv:1206.1901).

A chain moves along `leapfrog` steps of a force, from a random momentum, and a Metropolis test
accepts or rejects the end. A leapfrog step keeps volumes and can be undone for any force that
depends on the position alone. So the stationary distribution is right even if the force is not the
gradient of the log-density.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPTED = 0.75  # the rate that the step size is adapted to; 0.65 to 0.9 are about as good
MEMORY = 0.9  # decay of the running estimate of the scales
FIRST_STEP = 0.2  # in units of the scales


class Point(NamedTuple):
    """The states of B chains."""

    s: Tensor  # coordinates (B, ...)
    log_density: Tensor  # of the model, (B,) in nats
    force: Tensor  # its gradient or a substitute, (B, ...)


# Coordinates `(B, ...)` to the log-density `(B,)` and the force `(B, ...)`.
Target = Callable[[Tensor], tuple[Tensor, Tensor]]


class Chains:
    """B chains of `beta log p(s) - |s|^2 / 2`: from independent normal numbers at beta = 0 to the
    target at beta = 1 (annealing, Neal 2001).

    All chains share the step size and the scale of each coordinate, `1 / sqrt(mean g^2)` of the
    force g, whose mean square is the curvature of the log-density. Both are constant unless
    `adapting`, as the stationary distribution needs.

    Args:
        target: The log-density p and its force.
        s: Start of the chains, `(B, ...)`.
        moves: Which coordinates move, bool `(...)`.
        leapfrog: Mean number of leapfrog steps. Each is drawn from half to three halves of it,
            because a fixed number can be a period of the motion.
        generator: Draws all random numbers, on the CPU.
    """

    def __init__(
        self, target: Target, s: Tensor, moves: Tensor, leapfrog: int, generator: torch.Generator
    ):
        self.target, self.moves, self.leapfrog = target, moves.to(s), leapfrog
        self.generator = generator
        self.put(s)
        self.step = FIRST_STEP
        self.curvature: Tensor | None = None

    def put(self, s: Tensor) -> None:
        """Moves the chains to `s`, `(B, ...)`."""
        self.point = Point(s, *self.target(s))

    def move(self, beta: float, adapting: bool) -> Tensor:
        """One move of each chain. Returns its acceptance probabilities `(B,)`."""
        point, begin = self.point, self.point
        if adapting:
            self._note_curvature(begin, beta)
        assert self.curvature is not None
        step = self.step * self.moves * self.curvature.clamp_min(0.25).rsqrt()
        normal = torch.randn(begin.s.shape, generator=self.generator)
        momentum = start = normal.to(begin.s)
        longest = self.leapfrog + (self.leapfrog + 1) // 2
        drawn = torch.randint(
            self.leapfrog - self.leapfrog // 2, longest + 1, (), generator=self.generator
        )
        for _ in range(int(drawn)):
            momentum = momentum + 0.5 * step * (beta * point.force - point.s)
            s = point.s + step * momentum
            point = Point(s, *self.target(s))
            momentum = momentum + 0.5 * step * (beta * point.force - point.s)
        log_ratio = self._energy(begin, start, beta) - self._energy(point, momentum, beta)
        probability = log_ratio.exp().clamp(max=1).nan_to_num(0.0)
        uniform = torch.rand(probability.shape, generator=self.generator).to(probability)
        accepted = uniform < probability
        self.point = Point(
            *(
                torch.where(accepted.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(point, begin, strict=True)
            )
        )
        if adapting:
            error = float(probability.mean()) - ACCEPTED
            self.step *= min(max(1 + 0.3 * error, 0.5), 1.2)
        return probability

    def _energy(self, point: Point, momentum: Tensor, beta: float) -> Tensor:
        squares = (point.s.square() + momentum.square()).flatten(1).double().sum(dim=1)
        return 0.5 * squares - beta * point.log_density.double()

    def _note_curvature(self, point: Point, beta: float) -> None:
        force = (beta * point.force - point.s).nan_to_num(0.0, 0.0, 0.0)
        curvature = force.square().mean(dim=0)
        if self.curvature is None:
            self.curvature = curvature
        self.curvature = torch.lerp(curvature, self.curvature, MEMORY)


def effective_size(history: Tensor) -> float:
    """Effective sample size of chains, `(T, B, F)`: the mean over the F quantities that change.

    It is the estimate of Stan (Vehtari et al. 2021, arXiv:1903.08008, eq. 10-13; Geyer 1992): each
    chain is split in two, and correlations along the chains count until a pair of them is negative.
    Chains that do not agree with each other count as correlated.
    """
    steps = len(history) // 2
    if steps < 2:
        return float(history.shape[1])
    x = torch.cat([history[:steps], history[steps : 2 * steps]], dim=1).double()  # (T/2, 2 B, F)
    mean = x.mean(dim=0)
    centred = x - mean
    within = centred.square().sum(dim=0).mean(dim=0) / (steps - 1)
    between = steps * mean.var(dim=0)
    total = within * (steps - 1) / steps + between / steps
    moved = total > 0
    if not moved.any():
        return 1.0
    sums = torch.zeros_like(total)
    going = torch.ones_like(total, dtype=torch.bool)
    for lag in range(0, steps - 1, 2):
        pair = sum(
            1 - (within - (centred[k:] * centred[: steps - k]).sum(0).mean(0) / (steps - 1)) / total
            for k in (lag, lag + 1)
        )
        going &= torch.as_tensor(pair > 0)
        if not going[moved].any():
            break
        sums += torch.where(going, pair, 0.0)
    count = steps * x.shape[1]
    sizes = (count / (2 * sums - 1).clamp_min(1.0))[moved]
    return float(sizes.mean())

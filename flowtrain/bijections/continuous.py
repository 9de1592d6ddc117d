"""Continuous flows: FFJORD (Grathwohl et al. 2019, arXiv:1810.01367), with torchdiffeq's
solvers.
"""

import zlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.precision import full_precision
from flowtrain.errors import UserError

Solver = Literal["dopri5", "dopri8"]
Trace = Literal["auto", "exact", "hutchinson"]

EXACT_DIMS = 16  # up to here a trace that is exact costs little more than an estimate
FIRST_STEP = 0.1  # of the solver, which then chooses for itself
MAX_STEPS = 1000  # of a solution; more are the sign of weights that blow up
EVALUATION = 0.01  # of the tolerances, where no gradient is recorded
ROUNDING = 16  # times the float's precision: the smallest tolerance that a solver can keep
STAGES = 8  # of a picture of the way from the base to the data


def torchdiffeq() -> Any:
    """The module, or `UserError` where it is not installed."""
    try:
        import torchdiffeq  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            "model.name: cnf needs the package torchdiffeq: pip install 'flowtrain[cnf]'"
        ) from None
    return torchdiffeq


class ConcatSquash(nn.Linear):
    """`(W x + b) * sigmoid(t a + c) + t d`: a linear layer that depends on time (FFJORD's release,
    "concatsquash").
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gate = nn.Parameter(torch.empty(2, out_features).uniform_(-1, 1))  # a, c
        self.drift = nn.Parameter(torch.empty(out_features).uniform_(-1, 1))  # d

    def forward(  # type: ignore[override]
        self, t: Tensor, x: Tensor, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x` `(B, C)` and tangents `(B or 1, K, C)`, each along with one example, to those of the
        output.
        """
        slope, offset = self.gate
        gate = torch.sigmoid(t * slope + offset)
        weight = self.weight * gate[:, None]
        return F.linear(x, weight, self.bias * gate + t * self.drift), F.linear(tangents, weight)


class Dynamics(nn.Module):
    """The velocity f(x, t) of vectors: a tanh network of `ConcatSquash` layers, whose last one
    starts at zero.

    Args:
        dims: D, of the vectors.
        width: units of a hidden layer.
        hidden_layers: their number.
    """

    def __init__(self, dims: int, width: int, hidden_layers: int):
        super().__init__()
        sizes = [dims, *[width] * hidden_layers, dims]
        self.layers = nn.ModuleList(
            ConcatSquash(a, b) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        last = self.layers[-1]
        for parameter in (last.weight, last.bias, last.drift):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, t: Tensor, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity `(B, D)` and `sum_k e_k^T (df/dx) e_k` `(B,)`, for probes e `(B or 1, K,
        D)`.

        The derivative along the probes is computed beside the value (forward mode): with the D unit
        vectors the sum is the trace, with one vector of random signs an unbiased estimate of it.
        """
        velocity, tangents = self.layers[0](t, x, probes)
        for layer in self.layers[1:]:
            hidden = velocity.tanh()
            velocity, tangents = layer(t, hidden, tangents * (1 - hidden.square())[:, None])
        return velocity, (probes * tangents).sum(dim=(1, 2))


class Continuous(Bijection):
    """`dx/dt = f(x, t)` from the data at t = 0 to z at t = 1, `log|det| = int_0^1 tr(df/dx) dt`
    (FFJORD, eq. 2-4), on vectors `(B, D)`. The inverse solves it from t = 1 to t = 0. Both are what
    `solver` makes of it, to the tolerances.

    **The trace** is exact wherever no gradient is recorded: every likelihood that is reported. For
    a gradient, `exact` is exact too, `hutchinson` is Hutchinson's estimate by one probe of random
    signs an example (eq. 7-8), and `auto` is exact up to D = 16. The signs are a function of the
    bits of the example itself: so they change with the dequantization noise and the ActNorm in
    front, are the same when a step is computed again, after resuming, or with other batch mates,
    and no random state is left to be saved. (With `train.memory: reversible` the backward pass has
    the example up to rounding, and so other signs: as good a gradient, of another estimate.)

    **Tolerances and batch mates**: a step is as long as keeps the error of every entry of x, and of
    the log-determinant, of every example within `atol + rtol * |change so far|`. Step sizes are
    common to a batch, and the one thing that an example has from the others: results in two batches
    differ by what the tolerances allow. Without a gradient these are a hundredth, with the defaults
    1e-6, and then such differences are of the size of float32's
    rounding: a few 1e-6 bits/dim. No tolerance is below 16 times the rounding of the numbers.

    **Gradients** are those of the solver's steps (the steps' sizes held fixed), or with `adjoint`
    solve a second equation backwards (Chen et al. 2018, arXiv:1806.07366, with the seminorm of
    Kidger et al. 2021, arXiv:2009.09457): correct to the tolerances, in memory that does not grow
    with the number of steps.

    Always in full precision: rounding to bf16 would be the error that the solver tries to reduce.
    An example that is not finite comes out as NaN, alone; so do all of them where the solver needs
    more than 1000 steps.

    Args:
        conditioner: gives velocity and trace: `(t, x, probes)` to `(B, D)` and `(B,)`, see
            `Dynamics`.
        solver: Runge-Kutta of order 5, or 8 for tolerances close to the rounding.
        rtol: relative tolerance of a step, for gradients; without them a hundredth of it.
        atol: absolute tolerance of a step, likewise.
        trace: in training: exact, or Hutchinson's estimate.
        adjoint: whether gradients come from the adjoint equation.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        solver: Solver = "dopri5",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        trace: Trace = "auto",
        adjoint: bool = False,
    ):
        super().__init__()
        self.conditioner = conditioner
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.trace = trace
        self.adjoint = adjoint
        self.evaluations = 0  # of f, in the last solution (and its adjoint)

    def metrics(self) -> dict[str, float]:
        """For `metrics.jsonl`: the function evaluations of the last solution, those of its adjoint
        included.
        """
        return {
            "function_evaluations": float(self.evaluations),
            "rtol": self.rtol,
            "atol": self.atol,
        }

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        end = self._solve(x, forwards=True)[-1]
        return end[:, :-1], end[:, -1]

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        end = self._solve(z, forwards=False)[-1]
        return end[:, :-1], end[:, -1]

    def reconstruct(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():  # to the tolerances of the forward pass that gave z
            x = self._solve(z, forwards=False, for_gradient=True)[-1][:, :-1]
        return x.requires_grad_(), *self(x, context)

    def stages(self, z: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(self._solve(z, forwards=False, intervals=STAGES)[:, :, :-1])

    def _solve(
        self, x: Tensor, forwards: bool, intervals: int = 1, for_gradient: bool = False
    ) -> Tensor:
        """x and log_det side by side, at the ends of equal `intervals` of time: `(intervals + 1, B,
        D + 1)`.
        """
        finite = x.isfinite().all(dim=1, keepdim=True)
        # What is solved for is the way from x, in which rounding is smaller than in where it leads.
        origin = F.pad(torch.where(finite, x, 0), (0, 1))
        for_gradient = for_gradient or torch.is_grad_enabled()
        probes = self._probes(x, for_gradient)
        self.evaluations = 0

        def rate(s: Tensor, state: Tensor) -> Tensor:
            self.evaluations += 1
            velocity, trace = self.conditioner(
                s if forwards else 1 - s, (origin + state)[:, :-1], probes
            )
            both = torch.cat([velocity, trace[:, None]], dim=1)
            return both if forwards else -both

        smallest = ROUNDING * torch.finfo(x.dtype).eps
        share = 1.0 if for_gradient else EVALUATION
        times = torch.linspace(0, 1, intervals + 1, dtype=torch.float64, device=x.device)
        options = {"first_step": FIRST_STEP, "max_num_steps": MAX_STEPS}
        settings: dict[str, Any] = {
            "method": self.solver,
            "rtol": max(share * self.rtol, smallest),
            "atol": max(share * self.atol, smallest),
            # A step ends where a result is wanted: interpolation would be less accurate than the
            # steps are.
            "options": {**options, "norm": _largest_error, "step_t": times[1:]},
        }
        odeint = torchdiffeq().odeint
        if self.adjoint:
            odeint = torchdiffeq().odeint_adjoint
            settings["adjoint_options"] = {
                **options,
                "norm": "seminorm",
                "step_t": times[:-1].flip(0),
            }
            settings["adjoint_params"] = (origin, *self.conditioner.parameters())
        with full_precision(x):
            try:
                states = origin + odeint(rate, torch.zeros_like(origin), times, **settings)
            # torchdiffeq's way to give up: too many steps, or a state that is not finite
            except AssertionError:
                states = (origin * torch.nan).expand(intervals + 1, *origin.shape)
        return torch.where(finite, states, torch.nan)

    def _probes(self, x: Tensor, for_gradient: bool) -> Tensor:
        """Unit vectors, `(1, D, D)`, or random signs, `(B, 1, D)`."""
        dims = x.shape[1]
        affordable = self.trace == "exact" or (self.trace == "auto" and dims <= EXACT_DIMS)
        if affordable or not for_gradient:
            return torch.eye(dims, dtype=x.dtype, device=x.device)[None]
        return random_signs(x)[:, None]


def random_signs(x: Tensor) -> Tensor:
    """1 or -1 (Rademacher) for each entry of `(B, D)`, a function of the bits of its example."""
    rows = x.detach().cpu().numpy()
    generators = [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
    bits = [
        torch.randint(2, row.shape, generator=g) for row, g in zip(rows, generators, strict=True)
    ]
    return (2 * torch.stack(bits) - 1).to(x)


def _largest_error(state: Tensor) -> Tensor:
    """Of any entry of any example. Without a gradient: it sets the sizes of steps."""
    return state.detach().abs().max()

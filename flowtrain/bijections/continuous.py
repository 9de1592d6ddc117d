"""Continuous flows (FFJORD, Grathwohl et al. 2019, arXiv:1810.01367), solved by torchdiffeq."""

import zlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import Bijection, Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.precision import full_precision, has_float64
from flowtrain.system import packages

Solver = Literal["dopri5", "dopri8"]
Trace = Literal["auto", "exact", "hutchinson"]

EXACT_DIMS = 16  # up to this D an exact trace costs little more than an estimate
FIRST_STEP = 0.1  # the solver chooses the other steps itself
MAX_STEPS = 1000  # per solution; more are a sign of weights that blow up
EVALUATION = 0.01  # factor of the tolerances if no gradient of the parameters is recorded
ROUNDING = 16  # a solver cannot keep tolerances below this multiple of the float's precision
STAGES = 8  # intervals of time in a picture of the way from the base to the data


def torchdiffeq() -> Any:
    """The module torchdiffeq. Raises `UserError` if it is not installed."""
    try:
        # Its constants are tensors, which belong to the CPU on whatever device a flow is built.
        with torch.device("cpu"):
            import torchdiffeq  # type: ignore[import-untyped]
    except ImportError:
        raise packages.missing("model.name: cnf", "torchdiffeq", extra="cnf") from None
    return torchdiffeq


class ConcatSquash(nn.Linear):
    """`(W x + b) * sigmoid(t a + c) + t d`, "concatsquash" in FFJORD's release; t is the time."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gate = nn.Parameter(torch.empty(2, out_features).uniform_(-1, 1))  # a, c
        self.drift = nn.Parameter(torch.empty(out_features).uniform_(-1, 1))  # d

    def forward(  # type: ignore[override]
        self, t: Tensor, x: Tensor, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps `x` `(B, C)` and tangents `(B or 1, K, C)` at `x` to the output and its tangents."""
        slope, offset = self.gate
        gate = torch.sigmoid(t * slope + offset)
        weight = self.weight * gate[:, None]
        return F.linear(x, weight, self.bias * gate + t * self.drift), F.linear(tangents, weight)


class Dynamics(nn.Module):
    """The velocity f(x, t) of vectors: a tanh network of `ConcatSquash` layers that starts at 0."""

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
        """The velocity `(B, D)` and the sum over K probes e of `e^T (df/dx) e`, `(B,)`.

        The `probes` have shape `(B or 1, K, D)`. The derivatives along them are computed in forward
        mode. The D unit vectors give the trace, and a vector of random signs an unbiased estimate.
        """
        velocity, tangents = self.layers[0](t, x, probes)
        for layer in self.layers[1:]:
            hidden = velocity.tanh()
            velocity, tangents = layer(t, hidden, tangents * (1 - hidden.square())[:, None])
        return velocity, (probes * tangents).sum(dim=(1, 2))


class Continuous(Bijection):
    """A neural ODE on vectors `(B, D)`, from the data at t = 0 to z at t = 1 (FFJORD, eq. 2-4).

    It solves `dx/dt = f(x, t)`, and `log|det| = int_0^1 tr(df/dx) dt`. The inverse solves both
    from t = 1 to t = 0.

    **The trace** is exact if no gradient of the parameters is recorded, so every reported
    likelihood uses the exact trace. With such gradients, `exact` is exact too, and `hutchinson` is
    Hutchinson's estimate from one probe of random signs per example (eq. 7-8). `auto` is exact up
    to D = 16, and the estimate above. The signs are a function of the bits of the example: they
    change with the dequantization noise, and stay the same when a step is computed again, after
    resuming, or in another batch. With `train.memory: reversible` the backward pass has the example
    only up to rounding, so its gradient is as good, but comes from another estimate.

    **Tolerances and the batch**: the error of each entry and log-determinant stays within `atol +
    rtol * |change so far|` per step. All examples of a batch share the step sizes, so results in
    two batches differ within the tolerances. Without those gradients, the tolerances are 100 times
    tighter, 1e-6 with the defaults. The differences are then a few 1e-6 bits/dim, about float32
    rounding. No tolerance is below 16 times the precision of the numbers.

    **Gradients** differentiate the solver's steps, with fixed step sizes. With `adjoint` they come
    from a second equation, solved backwards (Chen et al. 2018, arXiv:1806.07366, with the seminorm
    of Kidger et al. 2021, arXiv:2009.09457). They are then correct to within the tolerances, and
    the memory does not grow with the number of steps.

    The layer runs in full precision. An example that is not finite comes out as NaN and affects no
    other. If the solver gives up, for instance after 1000 steps, all examples come out as NaN.

    Args:
        conditioner: velocity and trace, `(t, x, probes)` to `(B, D)` and `(B,)`; see `Dynamics`.
        solver: Runge-Kutta of order 5, or of order 8 for tolerances close to rounding.
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
        self.evaluations = 0  # of f, in the last solution and its adjoint

    def untraceable_directions(self) -> list[Direction]:
        return ["forward", "inverse"]

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        end = self._solve(x, forwards=True)[-1]
        return end[:, :-1], end[:, -1]

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        end = self._solve(z, forwards=False)[-1]
        return end[:, :-1], end[:, -1]

    def reconstruct(
        self, z: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():  # but to the tolerances of the forward pass that gave z
            x = self._solve(z, forwards=False, for_gradient=True)[-1][:, :-1]
        return x.requires_grad_(), *self(x, context)

    def stages(self, z: Tensor) -> list[Tensor]:
        """`z`, and its way to `inverse(z)` at equal intervals of time, without gradients."""
        with torch.no_grad():
            return list(self._solve(z, forwards=False, intervals=STAGES)[:, :, :-1])

    def _solve(
        self, x: Tensor, forwards: bool, intervals: int = 1, for_gradient: bool = False
    ) -> Tensor:
        """The solution at the ends of `intervals` equal intervals: `(intervals + 1, B, D + 1)`.

        The last of the D + 1 columns is log_det. `for_gradient` has the settings of training.
        """
        finite = x.isfinite().all(dim=1, keepdim=True)
        # The solver's state is the change from x, which rounds more finely than x plus the change.
        origin = F.pad(torch.where(finite, x, 0), (0, 1))
        # A trained flow records gradients of its input at most, and its likelihood is reported.
        trains = any(parameter.requires_grad for parameter in self.parameters())
        for_gradient = for_gradient or (trains and torch.is_grad_enabled())
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
        clock = torch.float64 if has_float64(x) else torch.float32
        times = torch.linspace(0, 1, intervals + 1, dtype=clock, device=x.device)
        options = {"first_step": FIRST_STEP, "max_num_steps": MAX_STEPS, "dtype": clock}
        settings: dict[str, Any] = {
            "method": self.solver,
            "rtol": max(share * self.rtol, smallest),
            "atol": max(share * self.atol, smallest),
            # Steps end at the times of the results, because interpolation would be less accurate.
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
            except AssertionError:  # torchdiffeq gives up: too many steps, or a non-finite state
                states = (origin * torch.nan).expand(intervals + 1, *origin.shape)
        return torch.where(finite, states, torch.nan)

    def _probes(self, x: Tensor, for_gradient: bool) -> Tensor:
        """The probes of the trace: unit vectors, `(1, D, D)`, or random signs, `(B, 1, D)`."""
        dims = x.shape[1]
        affordable = self.trace == "exact" or (self.trace == "auto" and dims <= EXACT_DIMS)
        if affordable or not for_gradient:
            return torch.eye(dims, dtype=x.dtype, device=x.device)[None]
        return random_signs(x)[:, None]


def random_signs(x: Tensor) -> Tensor:
    """A sign, 1 or -1 (Rademacher), per entry of `x` `(B, D)`, from the bits of its example."""
    rows = x.detach().cpu().numpy()
    generators = [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
    bits = [
        torch.randint(2, row.shape, generator=g) for row, g in zip(rows, generators, strict=True)
    ]
    return (2 * torch.stack(bits) - 1).to(x)


def _largest_error(state: Tensor) -> Tensor:
    """The solver's error norm: the largest entry of any example, without a gradient."""
    return state.detach().abs().max()

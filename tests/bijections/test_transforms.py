"""Elementwise transforms on their own (monotone, bounded, exact far out), and the solver."""

import itertools
import math

import pytest
import torch
from helpers import seeded
from torch.nn import functional as F

from flowtrain.bijections import (
    AdditiveTransform,
    AffineTransform,
    MixtureTransform,
    SplineTransform,
    monotone,
)
from flowtrain.bijections.monotone import FREE_STEPS, solve_monotone

TRANSFORMS = {
    "additive": AdditiveTransform,
    "affine": AffineTransform,
    "spline": SplineTransform,
    "spline-two-bins": lambda: SplineTransform(2),
    "spline-narrow": lambda: SplineTransform(3, 0.5),
    "mixture": MixtureTransform,
    "mixture-one-component": lambda: MixtureTransform(1),
    "mixture-limit": lambda: MixtureTransform(3, 1.0),
}
every = pytest.mark.parametrize("name", TRANSFORMS)
mixtures = pytest.mark.parametrize(
    "name", [name for name in TRANSFORMS if name.startswith("mixture")]
)


def some(name, scale, dtype=torch.float64, shape=(8, 3, 40), seed=0):
    """A transform, and parameters with standard deviation `scale` for entries of `shape`."""
    transform = TRANSFORMS[name]().to(dtype)
    p = transform.parameters_per_entry
    parameters = torch.randn(
        shape[0], p * shape[1], *shape[2:], generator=seeded(seed), dtype=dtype
    )
    return transform, scale * parameters


def extreme(name, dtype, shape=(64, 3, 40)):
    """Parameters that are all 50 or -50, and inputs of all magnitudes from 0.001 to 1000."""
    transform, parameters = some(name, 1, dtype, shape)
    sizes = 10 ** torch.empty(shape, dtype=dtype).uniform_(-3, 3, generator=seeded(1))
    return (
        transform,
        50 * parameters.sign(),
        sizes * torch.randn(shape, generator=seeded(2), dtype=dtype).sign(),
    )


def grid(function, parameters, points, parameters_per_entry):
    """z and log-derivatives at all `points` `(N,)` with the parameters of each first entry.

    Both are `(B, 1, N)`.
    """
    entries = parameters.unflatten(1, (parameters_per_entry, -1)).flatten(2)[:, :, :1]
    return function(points.expand(len(entries), 1, -1), entries.repeat_interleave(len(points), 2))


@pytest.mark.run  # takes long
@every
@pytest.mark.parametrize("scale", [0.3, 3])
def test_density_integrates_to_one(name, scale):
    transform, parameters = some(name, scale, shape=(2, 1))
    # Bins are as narrow as a thousandth, and scales as wide as exp(4).
    parts = [(-400, -6, 40_000), (-6, 6, 200_000), (6, 400, 40_000)]
    points = torch.cat([torch.linspace(*part, dtype=torch.float64) for part in parts])
    points = points.unique()
    z, log_derivative = grid(transform, parameters, points, transform.parameters_per_entry)
    assert (z.diff() > 0).all()
    density = (log_derivative - 0.5 * z.square() - 0.5 * math.log(2 * math.pi)).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, points), torch.ones(2, 1, dtype=torch.float64), rtol=0, atol=1e-4
    )


@every
@pytest.mark.parametrize("scale", [0, 0.5, 3])
def test_log_derivative_is_that_of_autograd(name, scale):
    transform, parameters = some(name, scale)
    x = (2 * torch.randn(8, 3, 40, generator=seeded(3), dtype=torch.float64)).requires_grad_()
    z, log_derivative = transform(x, parameters)
    if name != "additive":
        torch.testing.assert_close(
            torch.autograd.grad(z.sum(), x)[0].log(), log_derivative, rtol=1e-7, atol=1e-7
        )
    z = z.detach().requires_grad_()
    x, log_derivative = transform.inverse(z, parameters)
    if name != "additive":
        torch.testing.assert_close(
            torch.autograd.grad(x.sum(), z)[0].log(), log_derivative, rtol=1e-7, atol=1e-7
        )


@pytest.mark.run  # takes long
@every
def test_gradients_of_both_directions(name):
    transform, parameters = some(name, 1, shape=(1, 2, 5))
    x = 2 * torch.randn(1, 2, 5, generator=seeded(3), dtype=torch.float64)
    inputs = x.requires_grad_(), parameters.requires_grad_()
    assert torch.autograd.gradcheck(transform.forward, inputs)
    assert torch.autograd.gradcheck(transform.inverse, inputs)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_and_bounds_with_extreme_parameters(name, dtype):
    transform, parameters, x = extreme(name, dtype)
    with torch.no_grad():
        z, log_derivative = transform(x, parameters)
        back, inverse_log_derivative = transform.inverse(z, parameters)
        again, there = transform(back, parameters)
    for result in (z, log_derivative, back, inverse_log_derivative):
        assert result.dtype == dtype and torch.isfinite(result).all()
    # Where the transform is flat, z does not determine x precisely; where it is steep, x does not
    # determine z precisely. One of the two has to be right.
    error = torch.minimum(
        (back - x).abs() / x.abs().clamp(min=1), (again - z).abs() / z.abs().clamp(min=1)
    )
    assert error.max() < 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        inverse_log_derivative, -there, rtol=1e-5, atol=2e-2 if dtype == torch.float32 else 1e-9
    )

    largest = {"affine": 2, "additive": 0, "mixture-limit": 2}.get(
        name, 8.3 if "spline" in name else 4
    )
    assert log_derivative.max() < largest + 1e-2
    if "mixture" not in name:
        assert log_derivative.min() > {"affine": -2, "additive": 0}.get(name, -23) - 1e-5


@every
@pytest.mark.parametrize("scale", [0.5, 50])
def test_far_out(name, scale):
    transform, parameters = some(name, scale, torch.float32)
    for size in (1e2, 1e4):
        x = size * torch.randn(8, 3, 40, generator=seeded(1)).sign()
        values = x.requires_grad_(), parameters.requires_grad_()
        results = transform(*values)
        gradients = torch.autograd.grad(sum(results).sum(), values)
        precise = transform.double()(x.double(), parameters.double())
        transform.float()
        for result, expected in zip(results, precise, strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-6 * size)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every
def test_nan_stays_nan(name):
    transform, parameters = some(name, 1, torch.float32)
    x = torch.empty(8, 3, 40).uniform_(-0.4, 0.4, generator=seeded())
    x[0, 0, 0] = parameters[1, 0, 0] = float("nan")
    with torch.no_grad():
        for function in (transform, transform.inverse):
            z, log_derivative = function(x, parameters)
            assert z[0, 0, 0].isnan() and z[1, 0, 0].isnan()
            assert torch.isfinite(z[2:]).all() and torch.isfinite(log_derivative[2:]).all()
    assert name == "additive" or "affine" in name or log_derivative[0, 0, 0].isnan()


@every
def test_parameters_of_an_entry_are_its_own(name):
    transform, parameters = some(name, 1, shape=(2, 3, 4))
    x = torch.full((2, 3, 4), 0.1, dtype=torch.float64)
    z = transform(x, parameters)[0]
    changed = parameters.clone().unflatten(1, (-1, 3))
    changed[0, :, 1, 2] += 0.5
    changed = transform(x, changed.flatten(1, 2))[0]
    assert (changed != z).nonzero().tolist() == [[0, 1, 2]]


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name.startswith("spline")])
def test_spline_starts_as_the_identity(name, dtype):
    transform, parameters = some(name, 0, dtype)
    x = torch.linspace(-6, 6, 960, dtype=dtype).view(8, 3, 40)
    for function in (transform, transform.inverse):
        z, log_derivative = function(x, parameters)
        torch.testing.assert_close(z, x, rtol=0, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(
            log_derivative, torch.zeros_like(x), rtol=0, atol=2e-4 if dtype.itemsize == 4 else 1e-12
        )


@mixtures
def test_mixture_starts_near_the_identity(name):
    transform, parameters = some(name, 0)
    x = torch.linspace(-30, 30, 960, dtype=torch.float64).view(8, 3, 40)
    z, log_derivative = transform(x, parameters)
    assert (
        (z - x).abs().max() < 0.2
        and log_derivative.min() > math.log(0.9)
        and log_derivative.max() < 1e-9
    )


def test_components_of_a_mixture_part():
    """If components were equal at the start, their gradients would be equal forever."""
    transform, parameters = some("mixture", 0, shape=(1, 1, 50))
    z, log_derivative = transform(
        torch.randn(1, 1, 50, generator=seeded(), dtype=torch.float64), parameters.requires_grad_()
    )
    (0.5 * z.square() - log_derivative).sum().backward()
    for group in parameters.grad.sum(2)[0].split([1, 4, 4, 1, 4])[1:3]:
        assert all(
            (a - b).abs() > 1e-3 * group.abs().max() for a, b in itertools.combinations(group, 2)
        )


# ---------------------------------------------------------------- splines


def knots(transform, parameters):
    """x, z and derivative at the knots by the formulas, `(B, K + 1)` each.

    `parameters` are those of one entry, `(B, P, ...)`.
    """
    k, bound = transform.bins, transform.tail_bound
    places = []
    for raw in (parameters[:, :k], parameters[:, k : 2 * k]):
        sizes = 2 * bound * (1e-3 + (1 - 1e-3 * k) * raw.softmax(1))
        places.append(F.pad(sizes, (1, 0)).cumsum(1) - bound)
    limit = math.log(1000)
    return *places, F.pad(limit * torch.tanh(parameters[:, 2 * k :] / limit), (1, 1)).exp()


@pytest.mark.parametrize("scale", [0.5, 2])
def test_spline_at_its_knots(scale):
    transform, parameters = some("spline", scale, shape=(30, 1))
    x, z, derivative = knots(transform, parameters)
    points = parameters[..., None].expand(-1, -1, 9)
    for aside in (-1e-12, 0, 1e-12):  # the map and its derivative are continuous there
        result, log_derivative = transform(x[:, None] + aside, points)
        torch.testing.assert_close(result[:, 0], z, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_derivative[:, 0].exp(), derivative, rtol=1e-3, atol=1e-6)
        result, log_derivative = transform.inverse(z[:, None] + aside, points)
        torch.testing.assert_close(result[:, 0], x, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_derivative[:, 0].exp(), 1 / derivative, rtol=1e-3, atol=1e-6)


def test_spline_is_the_identity_outside():
    transform, parameters = some("spline", 5)
    x = torch.tensor([-1e4, -4.0 - 1e-9, -4.0, 4.0, 4.0 + 1e-9, 1e4], dtype=torch.float64)
    for function in (transform, transform.inverse):
        result, log_derivative = grid(function, parameters, x, transform.parameters_per_entry)
        assert torch.equal(result, x.expand(8, 1, 6)) and not log_derivative.any()


@pytest.mark.parametrize("scale", [0, 1, 2])  # with 4, the result of nflows has NaN
def test_spline_against_nflows(scale):
    theirs = pytest.importorskip(
        "nflows.transforms.splines.rational_quadratic"
    ).rational_quadratic_spline
    transform, parameters = some("spline", scale)
    x = torch.empty(8, 3, 40, dtype=torch.float64).uniform_(-4, 4, generator=seeded(1))
    raw = parameters.unflatten(1, (23, 3)).movedim(1, -1)
    derivatives = F.pad(math.log(1000) * torch.tanh(raw[..., 16:] / math.log(1000)), (1, 1)).exp()
    # Derivatives of nflows are 0.001 + softplus(parameter).
    options = {"left": -4.0, "right": 4.0, "bottom": -4.0, "top": 4.0}
    arguments = raw[..., :8], raw[..., 8:16], (derivatives - 1e-3).expm1().log()
    for inverse, ours in ((False, transform), (True, transform.inverse)):
        expected = theirs(x, *arguments, inverse=inverse, **options)
        for result, value in zip(ours(x, parameters), expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- mixtures


def formula(transform, x, parameters):
    """The formulas of Flow++: `logit(F(x))`, its log-derivative, a, the shift, all u_i and s_i."""
    k, limit = transform.components, transform.limit
    raw = parameters.unflatten(1, (2 + 3 * k, -1))
    shift, logits, means, scales = raw.split([1, k, k, 1 + k], 1)
    scales = limit * torch.tanh(scales / limit)
    offsets = torch.tensor([(2 * i + 1) / k - 1 for i in range(k)]).to(x.dtype)
    offsets = offsets.view(-1, *[1] * (x.ndim - 1))
    u = (x[:, None] - means - offsets) / scales[:, 1:].exp()
    weights = logits.softmax(1)
    below = (weights * torch.sigmoid(u)).sum(1)
    above = (weights * torch.sigmoid(-u)).sum(1)
    density = (weights * torch.sigmoid(u) * torch.sigmoid(-u) / scales[:, 1:].exp()).sum(1)
    return (
        (below / above).log(),
        (density / below / above).log(),
        scales[:, 0],
        shift[:, 0],
        u,
        scales[:, 1:],
    )


@mixtures
@pytest.mark.parametrize("scale", [0, 1, 4])
def test_mixture_is_the_formula(name, scale):
    transform, parameters = some(name, scale)
    x = 3 * torch.randn(8, 3, 40, generator=seeded(1), dtype=torch.float64)
    w, log_derivative, a, shift, u, s = formula(transform, x, parameters)
    for result, expected in zip(
        transform(x, parameters), (w * a.exp() + shift, log_derivative + a), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    widest = (u.amax(1) - u.amin(1)).abs()
    assert (log_derivative <= (-s).amax(1) + 1e-9).all()
    assert (log_derivative >= (-s).amin(1) - (widest / 2).cosh().log() - 1e-9).all()


@mixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.3, 3, 30])
@pytest.mark.run  # takes long
def test_mixture_inverse_against_bisection(name, dtype, scale):
    transform, parameters = some(name, scale, dtype)
    z = 3 * torch.randn(8, 3, 40, generator=seeded(1), dtype=dtype)
    x = transform.inverse(z, parameters)[0]
    precise, inputs = TRANSFORMS[name]().double(), parameters.double()
    lower, upper = torch.full_like(z.double(), -1e5), torch.full_like(z.double(), 1e5)
    for _ in range(90):
        middle = (lower + upper) / 2
        small = precise(middle, inputs)[0] < z
        lower, upper = torch.where(small, middle, lower), torch.where(small, upper, middle)
    reached, log_derivative = precise(x.double(), inputs)
    error = torch.minimum(
        (x - upper).abs() / x.abs().clamp(min=1), (reached - z).abs() / z.abs().clamp(min=1)
    )
    assert error.max() < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype, most", [(torch.float32, 6), (torch.float64, 8)])
def test_mixture_inverse_takes_few_steps(dtype, most, monkeypatch):
    transform, parameters = some("mixture", 0.5, dtype)
    z = torch.randn(8, 3, 40, generator=seeded(1), dtype=dtype)
    calls = []

    def counted(function, *rest):
        return solve_monotone(lambda x: calls.append(1) or function(x), *rest)

    monkeypatch.setattr("flowtrain.bijections.mixture.solve_monotone", counted)
    with torch.no_grad():
        transform.inverse(z, parameters)
    assert len(calls) <= most


# ---------------------------------------------------------------- the solver

HARD = {
    "cubic": lambda x: (x**3, 3 * x**2),
    "steep": lambda x: (x.sinh(), x.cosh()),
    "flat": lambda x: ((x - 1) * (x > 1) + (x + 1) * (x < -1), (x.abs() > 1).to(x.dtype)),
    "step": lambda x: ((x > 0.3).to(x.dtype) * 2 - 1, torch.zeros_like(x)),
    "arctangent": lambda x: (x.atan(), 1 / (1 + x * x)),  # Newton's method diverges
    "wrong derivative": lambda x: (x, torch.full_like(x, 1e-3)),
    "far too large a derivative": lambda x: (x, torch.full_like(x, 1e3)),
    "constant": lambda x: (torch.ones_like(x), torch.zeros_like(x)),
    "not a number": lambda x: (x * float("nan"), torch.ones_like(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_solver_on_hard_functions(name, dtype):
    calls = []

    def function(x):
        calls.append(1)
        return HARD[name](x)

    target = torch.tensor([-0.7, -0.2, 0.0, 1e-3, 0.5, float("nan")], dtype=dtype)
    lower, upper = torch.full_like(target, -50), torch.full_like(target, 70)
    x = solve_monotone(function, target, lower, upper)
    assert len(calls) <= FREE_STEPS + 2 * math.log2(120 / torch.finfo(dtype).eps) + 2
    assert x[-1].isnan() and x[:-1].isnan().all() == (name == "not a number")
    precision = 10 * torch.finfo(dtype).eps
    values, targets = function(x)[0][:-1], target[:-1]
    if name in ("steep", "arctangent", "wrong derivative"):
        torch.testing.assert_close(values, targets, rtol=0, atol=precision)
    if name == "cubic":
        assert (values - targets).abs().max() < precision
    if name == "flat":
        torch.testing.assert_close(values, targets, rtol=0, atol=2 * precision)
    if name == "step":
        torch.testing.assert_close(
            x[:-1], torch.full_like(targets, 0.3), rtol=0, atol=2 * precision
        )


@pytest.mark.parametrize("name", [*HARD, "mixture"])
def test_looking_less_often_changes_nothing(name, monkeypatch):
    """As on a GPU, where each look waits for it."""
    calls = []

    def solved():
        calls.clear()
        if name == "mixture":
            transform, parameters = some("mixture", 1.5, torch.float32)
            z = torch.randn(8, 3, 40, generator=seeded(1))
            with torch.no_grad():
                return transform.inverse(z, parameters)[0]
        target = torch.linspace(-0.9, 0.9, 100)
        target[7] = float("nan")

        def function(x):
            calls.append(1)
            return HARD[name](x)

        return solve_monotone(
            function, target, torch.full_like(target, -50), torch.full_like(target, 70)
        )

    each_step = solved()
    least = len(calls)
    monkeypatch.setattr(monotone, "STEPS_OF_A_LOOK", {})
    assert torch.equal(solved().nan_to_num(9e9), each_step.nan_to_num(9e9))
    steps = monotone.STEPS_OF_A_LOOK_ELSEWHERE
    assert steps > 1 and (name == "mixture" or len(calls) == math.ceil(least / steps) * steps)


def test_solver_with_a_bracket_of_no_width():
    point = torch.tensor([-3.0, 0.0, 1e4])
    assert torch.equal(
        solve_monotone(lambda x: (x, torch.ones_like(x)), point, point, point), point
    )

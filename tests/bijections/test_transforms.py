"""Elementwise transforms on their own (monotone, bounded, exact far out), and the solver."""

import itertools
import math
from unittest import mock

import pytest
import torch
from helpers import seeded
from torch.nn import functional as F

from flowtrain import bijections as b
from flowtrain.bijections import monotone
from flowtrain.bijections.monotone import FREE_STEPS, solve_monotone

TRANSFORMS = {
    "additive": b.AdditiveTransform,
    "affine": b.AffineTransform,
    "spline": b.SplineTransform,
    "spline-narrow": lambda: b.SplineTransform(3, 0.5),
    "mixture": b.MixtureTransform,
    "mixture-one-component": lambda: b.MixtureTransform(1),
    "mixture-limit": lambda: b.MixtureTransform(3, 1.0),
}
every = pytest.mark.parametrize("name", TRANSFORMS)
mixtures = pytest.mark.parametrize(
    "name", [name for name in TRANSFORMS if name.startswith("mixture")]
)


def some(name, scale, dtype=torch.float64, shape=(8, 3, 40), seed=0):
    """A transform, and parameters with standard deviation `scale` for entries of `shape`."""
    transform = TRANSFORMS[name]().to(dtype)
    p = transform.parameters_per_entry
    shape = shape[0], p * shape[1], *shape[2:]
    return transform, scale * torch.randn(shape, generator=seeded(seed), dtype=dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_and_bounds_with_extreme_parameters(name, dtype):
    """They are all 50 or -50, and inputs have all magnitudes from 0.001 to 1000."""
    shape = 64, 3, 40
    transform, parameters = some(name, 1, dtype, shape)
    parameters = (1e30 if name == "affine" else 50) * parameters.sign()
    sizes = 10 ** torch.empty(shape, dtype=dtype).uniform_(-3, 3, generator=seeded(1))
    x = sizes * torch.randn(shape, generator=seeded(2), dtype=dtype).sign()
    with torch.no_grad():
        z, log_derivative = transform(x, parameters)
        back, inverse_log_derivative = transform.inverse(z, parameters)
        again, there = transform(back, parameters)
    for result in (z, log_derivative, back, inverse_log_derivative):
        assert result.dtype == dtype and torch.isfinite(result).all()
    # Where the transform is flat, z does not determine x precisely; where it is steep, x does not
    # determine z precisely. One of the two has to be right.
    pairs = (back, x), (again, z)
    errors = [(a - b).abs() / b.abs().clamp(min=1) for a, b in pairs]
    assert torch.minimum(*errors).max() < 300 * torch.finfo(dtype).eps
    atol = 2e-2 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(inverse_log_derivative, -there, rtol=1e-5, atol=atol)
    usual = 8.3 if "spline" in name else 4
    largest = {"affine": 2, "additive": 0, "mixture-limit": 2}.get(name, usual)
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


def test_the_scales_of_the_papers():
    x, shift = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    with_limit = b.TanhTransform(2)
    torch.nn.init.constant_(with_limit.limit, 1.5)
    for raw in (-3.0, 0.0, 2.0):
        parameters = torch.cat([shift, torch.full((1, 2), raw)], dim=1)
        for transform, scale in (
            (b.ExponentialTransform(), math.exp(raw)),
            (b.SigmoidTransform(), 2 / (1 + math.exp(-raw))),
            (b.AffineTransform(), math.exp(2 * math.tanh(raw / 2))),
            (with_limit, math.exp(1.5 * math.tanh(raw))),
        ):
            z, log_scale = transform(x, parameters)
            torch.testing.assert_close(z, (x + shift) * scale)
            torch.testing.assert_close(log_scale, torch.full((1, 2), math.log(scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "build",
    [
        b.SplineTransform,
        b.CircularSplineTransform,
        lambda: b.SplineTransform(3, 0.5),
        lambda: b.SplineTransform(3, 1.0, free_ends=True),
    ],
)
def test_spline_starts_as_the_identity(build, dtype):
    transform, x = build(), torch.linspace(-9, 9, 960, dtype=dtype).view(8, 3, 40)
    parameters = torch.zeros(8, 3 * transform.parameters_per_entry, 40, dtype=dtype)
    for function in (transform, transform.inverse):
        z, log_derivative = function(x, parameters)
        torch.testing.assert_close(z, x, rtol=0, atol=16 * torch.finfo(dtype).eps)
        atol = 2e-4 if dtype.itemsize == 4 else 1e-12
        torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=atol)


@mixtures
def test_mixture_starts_near_the_identity(name):
    transform, parameters = some(name, 0)
    x = torch.linspace(-30, 30, 960, dtype=torch.float64).view(8, 3, 40)
    z, log_derivative = transform(x, parameters)
    assert (z - x).abs().max() < 0.2
    assert log_derivative.min() > math.log(0.9) and log_derivative.max() < 1e-9


def test_components_of_a_mixture_part():
    """If components were equal at the start, their gradients would be equal forever."""
    transform, parameters = some("mixture", 0, shape=(1, 1, 50))
    x = torch.randn(1, 1, 50, generator=seeded(), dtype=torch.float64)
    z, log_derivative = transform(x, parameters.requires_grad_())
    (0.5 * z.square() - log_derivative).sum().backward()
    for group in parameters.grad.sum(2)[0].split([1, 4, 4, 1, 4])[1:3]:
        least = 1e-3 * group.abs().max()
        assert all((a - b).abs() > least for a, b in itertools.combinations(group, 2))


def knots(transform, parameters):
    """x, z and derivative `(B, K + 1)` at the knots, from parameters `(B, P, ...)` of one entry."""
    k, bound = transform.bins, transform.tail_bound
    places = []
    for raw in (parameters[:, :k], parameters[:, k : 2 * k]):
        sizes = 2 * bound * (1e-3 + (1 - 1e-3 * k) * raw.softmax(1))
        places.append(F.pad(sizes, (1, 0)).cumsum(1) - bound)
    limit = math.log(1000)
    return *places, F.pad(limit * torch.tanh(parameters[:, 2 * k :] / limit), (1, 1)).exp()


@pytest.mark.parametrize("scale", [0.5, 2])
def test_spline_is_the_formula(scale):
    """At its knots, where the map and its derivative are continuous, and between them (eq. 4)."""
    transform, parameters = some("spline", scale, shape=(30, 1))
    x, z, derivative = knots(transform, parameters)
    points = parameters[..., None].expand(-1, -1, 9)
    for aside in (-1e-12, 0, 1e-12):
        result, log_derivative = transform(x[:, None] + aside, points)
        torch.testing.assert_close(result[:, 0], z, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_derivative[:, 0].exp(), derivative, rtol=1e-3, atol=1e-6)
        result, log_derivative = transform.inverse(z[:, None] + aside, points)
        torch.testing.assert_close(result[:, 0], x, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_derivative[:, 0].exp(), 1 / derivative, rtol=1e-3, atol=1e-6)
    xi, start, end, height = 0.3, derivative[:, :-1], derivative[:, 1:], z.diff()
    slope = height / x.diff()
    numerator = height * (slope * xi**2 + start * xi * (1 - xi))
    expected = z[:, :-1] + numerator / (slope + (start + end - 2 * slope) * xi * (1 - xi))
    found = transform((x[:, :-1] + xi * x.diff())[:, None], points[..., 1:])[0]
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-10)


def test_spline_is_the_identity_outside():
    transform, parameters = some("spline", 5, shape=(8, 1, 6))
    x = torch.tensor([-1e4, -4.0 - 1e-9, -4.0, 4.0, 4.0 + 1e-9, 1e4], dtype=torch.float64)
    for function in (transform, transform.inverse):
        result, log_derivative = function(x.expand(8, 1, 6), parameters)
        assert torch.equal(result, x.expand(8, 1, 6)) and not log_derivative.any()


@mixtures
@pytest.mark.parametrize("scale", [0, 1, 4])
def test_mixture_is_the_formula(name, scale):
    """Of Flow++: `logit(F(x))` and its log-derivative."""
    transform, parameters = some(name, scale)
    x = 3 * torch.randn(8, 3, 40, generator=seeded(1), dtype=torch.float64)
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
    w, log_derivative = (below / above).log(), (density / below / above).log()
    expected = w * scales[:, 0].exp() + shift[:, 0], log_derivative + scales[:, 0]
    torch.testing.assert_close(transform(x, parameters), expected, rtol=1e-11, atol=1e-11)


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
    function = mock.Mock(wraps=HARD[name])
    target = torch.tensor([-0.7, -0.2, 0.0, 1e-3, 0.5, float("nan")], dtype=dtype)
    lower, upper = torch.full_like(target, -50), torch.full_like(target, 70)
    x = solve_monotone(function, target, lower, upper)
    assert function.call_count <= FREE_STEPS + 2 * math.log2(120 / torch.finfo(dtype).eps) + 2
    point = target[:-1]  # a bracket of no width
    assert torch.equal(solve_monotone(HARD["cubic"], point, point, point), point)
    assert x[-1].isnan() and x[:-1].isnan().all() == (name == "not a number")
    precision = 10 * torch.finfo(dtype).eps
    values, targets = function(x)[0][:-1], target[:-1]
    if name in ("steep", "arctangent", "wrong derivative", "cubic", "flat"):
        torch.testing.assert_close(values, targets, rtol=0, atol=2 * precision)
    if name == "step":
        at_the_step = torch.full_like(targets, 0.3)
        torch.testing.assert_close(x[:-1], at_the_step, rtol=0, atol=2 * precision)


@pytest.mark.parametrize("name", [*HARD, "mixture"])
def test_looking_less_often_changes_nothing(name, monkeypatch):
    """As on a GPU, where each look waits for it."""
    function = mock.Mock(wraps=HARD.get(name))

    def solved():
        function.reset_mock()
        if name == "mixture":
            transform, parameters = some("mixture", 1.5, torch.float32)
            z = torch.randn(8, 3, 40, generator=seeded(1))
            with torch.no_grad():
                return transform.inverse(z, parameters)[0]
        target = torch.linspace(-0.9, 0.9, 100)
        target[7] = float("nan")
        lower, upper = torch.full_like(target, -50), torch.full_like(target, 70)
        return solve_monotone(function, target, lower, upper)

    each_step = solved()
    least = function.call_count
    monkeypatch.setattr(monotone, "STEPS_OF_A_LOOK", {})
    assert torch.equal(solved().nan_to_num(9e9), each_step.nan_to_num(9e9))
    steps = monotone.STEPS_OF_A_LOOK_ELSEWHERE
    assert steps > 1 and function.call_count == math.ceil(least / steps) * steps

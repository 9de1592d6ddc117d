"""Continuous flows: known solutions, the trace and its estimate, gradients, commands."""

import math

import pytest
import torch
from catalogue import EXACT
from cli_helpers import metrics, quick
from helpers import CPU, a_config, jacobians, perturb, seeded
from torch import nn

from flowtrain.bijections import Continuous, Sequential
from flowtrain.bijections import continuous as module
from flowtrain.bijections.continuous import EVALUATION, EXACT_DIMS, STAGES, Dynamics, random_signs
from flowtrain.bijections.memory import executor_of
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory


def layer_of(dims, width=8, hidden_layers=2, scale=0.3, seed=0, **options):
    torch.manual_seed(seed)
    return perturb(Continuous(Dynamics(dims, width, hidden_layers), **options), scale, seed)


class Linear(nn.Module):
    """`f(x, t) = A x + t b`."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, t, x, probes):
        trace = (probes @ self.a.T * probes).sum(dim=(1, 2))
        return x @ self.a.T + t * self.b, trace.expand(len(x))


@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
@pytest.mark.run  # takes long
def test_a_linear_equation(solver):
    """`x(1) = e^A x + int_0^1 e^(A (1 - t)) t b dt`, and the log-determinant is tr A."""
    a = torch.randn(3, 3, generator=seeded(), dtype=torch.float64)
    b = torch.randn(3, generator=seeded(1), dtype=torch.float64)
    x = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)
    # (x, t b, b)' = M (x, t b, b)
    one, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    rows = [a, one, zero], [zero, zero, one], [zero, zero, zero]
    matrix = torch.cat([torch.cat(row, dim=1) for row in rows])
    start = torch.cat([x, torch.zeros_like(x), b.expand(5, 3)], dim=1)
    expected = (start @ torch.linalg.matrix_exp(matrix).T)[:, :3]
    layer = Continuous(Linear(a, b), solver, 1e-10, 1e-10)
    with torch.no_grad():
        z, log_det = layer(x)
        back, inverse_log_det = layer.inverse(z)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    for found, sign in ((log_det, 1), (inverse_log_det, -1)):
        torch.testing.assert_close(found, sign * a.trace().expand(5), rtol=0, atol=1e-9)


@pytest.mark.run  # takes long
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("gradient, share", [(True, 1.0), (False, EVALUATION)])
def test_the_tolerances_hold(tolerance, gradient, share):
    x = torch.randn(20, 4, generator=seeded(), dtype=torch.float64)
    exact = layer_of(4, scale=0.6, **EXACT).double()
    layer = layer_of(4, scale=0.6, rtol=tolerance, atol=tolerance).double()
    with torch.set_grad_enabled(gradient):
        found, expected = layer(x), exact(x)
    error = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    assert tolerance * share / 100 < error < 3 * tolerance * share


def test_smaller_tolerances_than_float32_has():
    x = torch.randn(20, 4, generator=seeded())
    layer, exact = layer_of(4, rtol=1e-12, atol=1e-12), layer_of(4, **EXACT).double()
    with torch.no_grad():
        for found, expected in zip(layer(x), exact(x.double()), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.evaluations < 200


def test_more_evaluations_for_less_error():
    x = torch.randn(20, 4, generator=seeded())
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        layer = layer_of(4, scale=1.0, rtol=tolerance, atol=tolerance)
        calls = []
        layer.conditioner.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        for _ in range(2):  # the count starts anew each time
            calls.clear()
            layer(x)
            assert layer.evaluations == len(calls)
        counts.append(layer.evaluations)
    assert counts[0] < counts[1] < counts[2]
    layer = layer_of(4, scale=1.0, rtol=1e-2, atol=1e-2)
    assert torch.equal(layer.reconstruct(x)[0], layer.inverse(x)[0])
    with torch.no_grad():  # where the reconstruction keeps the tolerances of training
        assert not torch.equal(layer.reconstruct(x)[0], layer.inverse(x)[0])


@pytest.mark.run  # takes long
def test_stages_are_on_the_way():
    layer = layer_of(3, **EXACT).double()
    z = torch.randn(6, 3, generator=seeded(), dtype=torch.float64)
    stages = layer.stages(z)
    assert len(stages) == STAGES + 1 and torch.equal(stages[0], z) and not stages[-1].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(stages[-1], layer.inverse(z)[0], rtol=0, atol=1e-10)
        # The velocity at one time, from the stages before and after it.
        middle, probes = STAGES // 2, torch.zeros(1, 1, 3, dtype=torch.float64)
        velocity, _ = layer.conditioner(torch.tensor(0.5), stages[middle], probes)
        change = (stages[middle - 1] - stages[middle + 1]) * STAGES / 2
    torch.testing.assert_close(change, velocity, rtol=0.05, atol=0.02)


def test_the_trace_is_that_of_the_jacobian():
    dynamics = perturb(Dynamics(5, 7, 2)).double()
    t, probes = torch.tensor(0.4, dtype=torch.float64), torch.eye(5, dtype=torch.float64)[None]
    x = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    each = jacobians(lambda v: dynamics(t, v, probes), x)
    torch.testing.assert_close(dynamics(t, x, probes)[1], each.diagonal(dim1=1, dim2=2).sum(1))
    signs = random_signs(x)
    expected = torch.einsum("bi,bij,bj->b", signs, each, signs)
    torch.testing.assert_close(dynamics(t, x, signs[:, None])[1], expected)


@pytest.mark.parametrize("trace", ["auto", "exact", "hutchinson"])
@pytest.mark.parametrize("dims", [EXACT_DIMS, EXACT_DIMS + 1])
def test_when_the_trace_is_exact(trace, dims):
    layer = layer_of(dims, trace=trace, rtol=1e-6, atol=1e-6)
    x = torch.randn(4, dims, generator=seeded())
    with torch.no_grad():
        z, exact = layer(x)
        torch.testing.assert_close(layer.inverse(z)[1], -exact, rtol=0, atol=1e-4)
    recorded = layer(x)[1].detach()
    estimates = trace == "hutchinson" or (trace == "auto" and dims > EXACT_DIMS)
    assert torch.allclose(recorded, exact, rtol=0, atol=1e-5) != estimates
    layer.requires_grad_(False)  # a trained flow, perhaps with a gradient of its input
    for given in (x, x.clone().requires_grad_()):
        torch.testing.assert_close(layer(given)[1].detach(), exact, rtol=0, atol=1e-5)


def test_computing_again_uses_the_same_signs():
    """`checkpoint` records no graph in its forward pass, but needs the signs of the backward."""
    chain, x = Sequential(layer_of(20, trace="hutchinson")), torch.randn(4, 20, generator=seeded())
    found = []
    for mode in ("store", "checkpoint"):
        log_det = chain.run(executor_of(mode), "forward", x)[1]
        gradients = torch.autograd.grad(log_det.sum(), list(chain.parameters()), allow_unused=True)
        found.append([log_det.detach(), *(g for g in gradients if g is not None)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_signs_are_a_function_of_the_example():
    x = torch.randn(500, 40, generator=seeded())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    signs = random_signs(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.dtype == x.dtype and torch.equal(random_signs(x[7:9]), signs[7:9])
    moved = random_signs(torch.nextafter(x, x + 1))
    for other in (moved, signs.roll(1, 0)):  # practically independent
        assert abs((signs * other).mean().item()) < 4 / math.sqrt(signs.numel())
    assert signs.mean(0).abs().max() < 5 / math.sqrt(500)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_that_is_not_finite_is_alone(bad):
    layer, x, others = layer_of(3), torch.randn(4, 3, generator=seeded()), [0, 2, 3]
    broken = x.clone()
    broken[1, 2] = bad
    for function in (layer.forward, layer.inverse):
        z, log_det = function(broken)
        assert z[1].isnan().all() and log_det[1].isnan()
        found = z[others], log_det[others]
        torch.testing.assert_close(found, function(x[others]), rtol=0, atol=1e-4)


def test_too_many_steps_are_not_a_number(monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 2)
    layer = layer_of(3, scale=3.0)
    x = torch.randn(4, 3, generator=seeded()).requires_grad_()
    z, log_det = layer(x)
    assert z.isnan().all() and log_det.isnan().all() and z.shape == x.shape
    log_det.sum().backward()  # the trainer checks the loss only after the backward pass
    with torch.no_grad():
        layer.conditioner.layers[0].weight.fill_(math.nan)
    assert layer(x)[0].isnan().all()
    assert all(stage.isnan().all() for stage in layer.stages(x.detach())[1:])


@pytest.mark.run  # takes long
@pytest.mark.parametrize("direction, trace", [("forward", "exact"), ("inverse", "hutchinson")])
def test_the_adjoint_has_the_same_gradients(direction, trace):
    gradients, evaluations = [], []
    for adjoint in (False, True):
        layer = layer_of(5, trace=trace, adjoint=adjoint, **EXACT).double()
        x = torch.randn(4, 5, generator=seeded(), dtype=torch.float64).requires_grad_()
        z, log_det = getattr(layer, direction)(x)
        before = layer.evaluations
        (z.sin().sum() + (log_det * torch.arange(1, 5)).sum()).backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
        evaluations.append(layer.evaluations - before)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-8)
    assert evaluations[0] == 0 < evaluations[1]


@pytest.mark.run
def test_a_run_reports_the_solver(tmp_path):
    often = {"num_steps": 3, "log_every": 1, "validate_every": 3}
    config = a_config({"name": "cnf", "width": 8, "hidden_layers": 1}, train=often)
    fit(config, RunDirectory(tmp_path), CPU)
    *train, validation = metrics(tmp_path)
    assert [row["function_evaluations"] > 5 for row in train] == [True] * 3
    assert {(row["rtol"], row["atol"]) for row in train} == {(1e-4, 1e-4)}
    assert validation["split"] == "validation" and "function_evaluations" not in validation


@pytest.mark.run
def test_without_the_extra(tmp_path):
    # In a process without torchdiffeq.
    hidden = "import sys; sys.modules['torchdiffeq'] = None"
    done = quick("train", "model.name=cnf", cwd=tmp_path, first=hidden)
    done.failed(2, "model.name: cnf needs the package torchdiffeq (the extra cnf): ")
    assert not (tmp_path / "runs").exists()

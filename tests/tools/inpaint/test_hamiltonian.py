"""Hamiltonian Monte Carlo: it has the right stationary distribution, also with a wrong force."""

import pytest
import torch
from helpers import seeded

from flowtrain.tools.inpaint.hamiltonian import Chains, effective_size

B = 2000


def chains(force=lambda g: g, moves=(True, True)):
    """Chains of two correlated normal numbers. The density is relative to N(0, I)."""
    precision = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    mean = torch.tensor([1.0, -0.5])

    def target(s):
        away = s - mean
        log_density = -0.5 * torch.einsum("bi,ij,bj->b", away, precision, away)
        return log_density + 0.5 * s.square().sum(1), force(-away @ precision) + s

    s = torch.randn(B, 2, generator=seeded(1))
    return Chains(target, s, torch.tensor(moves), 6, seeded(0)), precision, mean


@pytest.mark.parametrize(
    "force", [lambda g: g, lambda g: 0.7 * g + 0.3, torch.round], ids=["g", "wrong", "stale"]
)
def test_the_distribution_is_right_for_any_force(force):
    walk, precision, mean = chains(force)
    rates = [walk.move(min(1.0, (k + 1) / 15), adapting=k < 25) for k in range(60)]
    assert 0.5 < torch.stack(rates[25:]).mean() < 0.99
    covariance, found = torch.linalg.inv(precision), walk.point.s
    error = (found.mean(0) - mean) / (covariance.diagonal() / B).sqrt()
    assert error.abs().max() < 4
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.15, atol=0.05)


def test_a_coordinate_that_does_not_move_stays_and_scales_are_fixed_after_the_warm_up():
    walk, _, _ = chains(moves=(True, False))
    begin = walk.point.s.clone()
    walk.move(1.0, adapting=True)
    assert torch.equal(walk.point.s[:, 1], begin[:, 1])
    assert not torch.equal(walk.point.s[:, 0], begin[:, 0])
    step, curvature = walk.step, walk.curvature.clone()
    walk.move(1.0, adapting=False)
    assert walk.step == step and torch.equal(walk.curvature, curvature)


def test_the_effective_size_of_known_correlations():
    # An autoregressive series with the coefficient a is worth T (1 - a) / (1 + a) samples.
    a, steps = 0.6, 400
    noise, rows = torch.randn(steps, 8, 20, generator=seeded(0)), []
    row = noise[0] / (1 - a**2) ** 0.5
    for each in noise:
        rows.append(row)
        row = a * row + each
    found = effective_size(torch.stack(rows))
    assert found == pytest.approx(8 * steps * (1 - a) / (1 + a), rel=0.15)
    assert effective_size(noise) == pytest.approx(8 * steps, rel=0.15)
    apart = noise[:50, :4, :3] + 10 * torch.arange(4.0)[:, None]  # chains that disagree
    assert effective_size(apart) < 10
    assert effective_size(torch.ones(50, 4, 3)) == 1.0  # nothing has moved

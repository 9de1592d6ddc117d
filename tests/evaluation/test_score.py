"""A model whose density is known in closed form: its bounds, their order, and the errors that are
reported.
"""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.data.splits import Split
from flowtrain.evaluation.evaluate import summarize
from flowtrain.evaluation.score import Scores, score
from flowtrain.flow.dequantize import Dequantizer, UniformNoise
from flowtrain.flow.flow import Flow

LEVELS = 8
SHAPE = (1, 2, 2)
SCALE, SHIFT = 4.0, 0.3


class AllOfTheBin(UniformNoise):
    """Without the edges, which the closed form knows nothing of: exact in float64."""

    def forward(self, noise, x):
        return noise, noise.new_zeros(len(noise))


@pytest.fixture(scope="module")
def flow():
    """`z = SCALE * (y - 1/2) + SHIFT` in every entry, with a normal base."""
    affine = DiagonalAffine(SHAPE)
    with torch.no_grad():
        affine.log_scale.fill_(8 * math.atanh(math.log(SCALE) / 8))
        affine.shift.fill_(SHIFT)
    dequantizer = Dequantizer(LEVELS, noise_model=AllOfTheBin())
    return (
        Flow(Sequential(affine, Flatten(SHAPE)), dequantizer, SHAPE).double().requires_grad_(False)
    )


@pytest.fixture(scope="module")
def split():
    pixels = np.random.default_rng(0).integers(0, LEVELS, (50, *SHAPE), "u1")
    return Split(pixels, np.arange(50), 0)


def ends_of_bins(split):
    x = torch.from_numpy(split.pixels).double().flatten(1)
    return [SCALE * ((x + end) / LEVELS - 0.5) + SHIFT for end in (0, 1)]


def true_bits(split):
    """`P(x)`: the mass of the normal distribution in the bin."""
    low, high = (Normal(0, 1).cdf(end) for end in ends_of_bins(split))
    return -(high - low).log2().mean().item()


def elbo_bits(split):
    """`E_u log p(y)`: the second moment of a uniform variable in the bin."""
    low, high = ends_of_bins(split)
    square = (low**2 + low * high + high**2) / 3
    nats = -0.5 * (square + math.log(2 * math.pi)) + math.log(SCALE / LEVELS)
    return -nats.mean().item() / math.log(2)


def test_the_single_draw_bound_is_the_closed_form(flow, split):
    result = summarize(score(flow, split, samples=400), flow)
    assert result["elbo_bits_per_dim_stderr_draws"] < 1e-3
    assert result["elbo_bits_per_dim"] == pytest.approx(
        elbo_bits(split), abs=4 * result["elbo_bits_per_dim_stderr_draws"]
    )


def test_the_importance_weighted_bound_lies_between_the_single_draws_and_the_truth(flow, split):
    seeds = range(20)
    means = {
        k: np.mean(
            [summarize(score(flow, split, samples=k, seed=s), flow)["bits_per_dim"] for s in seeds]
        )
        for k in (1, 2, 8, 64)
    }
    truth, elbo = true_bits(split), elbo_bits(split)
    assert elbo - truth > 0.02  # there is something to be gained
    assert means[1] == pytest.approx(elbo, abs=5e-3)
    assert means[1] > means[2] > means[8] > means[64] > truth
    assert means[64] - truth < 0.05 * (elbo - truth)


@pytest.mark.parametrize("k", [2, 16])
def test_the_error_over_draws_is_what_another_seed_changes(flow, split, k):
    results = [summarize(score(flow, split, samples=k, seed=seed), flow) for seed in range(150)]
    for prefix in ("", "elbo_"):
        spread = np.std([result[f"{prefix}bits_per_dim"] for result in results])
        reported = np.sqrt(
            np.mean([result[f"{prefix}bits_per_dim_stderr_draws"] ** 2 for result in results])
        )
        # The jackknife of two draws is crude: it is too large rather than too small.
        assert 0.8 * spread < reported < (1.25 if prefix or k > 2 else 1.7) * spread, prefix
        over_images = results[0][f"{prefix}bits_per_dim_stderr"]
        assert over_images > 2 * reported


def test_bounds_of_one_draw_are_the_same(flow, split):
    result = summarize(score(flow, split), flow)
    assert result["bound"] == "elbo" and result["elbo_bits_per_dim"] == pytest.approx(
        result["bits_per_dim"]
    )
    assert (
        result["bits_per_dim_stderr_draws"] is None
        and result["elbo_bits_per_dim_stderr_draws"] is None
    )


def test_leaving_one_draw_out():
    generator = torch.Generator().manual_seed(0)
    draws = 30 * torch.randn(7, 40, dtype=torch.float64, generator=generator)
    draws[:, 0] = draws[0, 0]  # all the same
    draws[:2, 1] = 500  # two that outweigh the rest
    draws[0, 2] = 5000  # one that leaves nothing of the others
    zero = torch.zeros(40, dtype=torch.float64)
    found = Scores(draws, zero, zero).log_prob_leaving_one_out()
    for k in range(7):
        others = torch.cat([draws[:k], draws[k + 1 :]])
        torch.testing.assert_close(
            found[k], others.logsumexp(dim=0) - math.log(6), rtol=1e-12, atol=1e-12
        )

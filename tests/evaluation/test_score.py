"""Scores of images: their bounds, where the density is known in closed form, and their batches."""

import math

import numpy as np
import pytest
import torch
from coding_helpers import affine_flow
from helpers import tiny_flow

from flowtrain.data.splits import Split
from flowtrain.errors import UserError
from flowtrain.evaluation import score as scoring
from flowtrain.evaluation.evaluate import summarize
from flowtrain.evaluation.score import Scores, mean_loss, score
from flowtrain.flow.dequantize import UniformNoise
from flowtrain.system import capacity
from flowtrain.system.random import Stream, uniform

LEVELS = 8
SHAPE = (1, 2, 2)
SCALE, SHIFT = 4.0, 0.3


class AllOfTheBin(UniformNoise):
    """Without the edges, which the closed form does not have: exact in float64."""

    def forward(self, noise, x, executor=None):
        return noise, noise.new_zeros(len(noise))


@pytest.fixture(scope="module")
def flow():
    found = affine_flow(SHAPE, LEVELS, SCALE, SHIFT)
    found.dequantizer.noise_model = AllOfTheBin()
    return found.double().requires_grad_(False)


@pytest.fixture(scope="module")
def split():
    pixels = np.random.default_rng(0).integers(0, LEVELS, (50, *SHAPE), "u1")
    return Split(pixels, np.arange(50))


def elbo_bits(split):
    """`E_u log p(y)`: the second moment of a uniform variable in the bin."""
    x = torch.from_numpy(split.pixels).double().flatten(1)
    low, high = (SCALE * ((x + end) / LEVELS - 0.5) + SHIFT for end in (0, 1))
    square = (low**2 + low * high + high**2) / 3
    nats = -0.5 * (square + math.log(2 * math.pi)) + math.log(SCALE / LEVELS)
    return -nats.mean().item() / math.log(2)


def test_the_single_draw_bound_is_the_closed_form(flow, split):
    result = summarize(score(flow, split, draws=400), flow)
    error = result["elbo_bits_per_dim_stderr_draws"]
    assert error < 1e-3
    assert result["elbo_bits_per_dim"] == pytest.approx(elbo_bits(split), abs=4 * error)
    one = summarize(score(flow, split), flow)
    assert one["bound"] == "elbo"
    assert one["elbo_bits_per_dim"] == pytest.approx(one["bits_per_dim"])
    assert one["loss_stderr_draws"] is one["elbo_bits_per_dim_stderr_draws"] is None


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.run
def test_the_error_over_draws_is_what_another_seed_changes(flow, split, k):
    results = [summarize(score(flow, split, draws=k, seed=seed), flow) for seed in range(150)]
    for name in ("loss", "elbo_bits_per_dim"):
        spread = np.std([result[name] for result in results])
        reported = np.sqrt(np.mean([result[f"{name}_stderr_draws"] ** 2 for result in results]))
        # The jackknife of two draws is crude: it is too large rather than too small.
        assert 0.8 * spread < reported < (1.7 if (name, k) == ("loss", 2) else 1.25) * spread, name
        assert results[0][f"{name}_stderr"] > 2 * reported


def test_leaving_one_draw_out():
    generator = torch.Generator().manual_seed(0)
    draws = 30 * torch.randn(7, 40, dtype=torch.float64, generator=generator)
    draws[:, 0] = draws[0, 0]  # all the same
    draws[:2, 1] = 500  # two that outweigh the rest
    draws[0, 2] = 5000  # one that leaves nothing of the others
    zero = torch.zeros(40, dtype=torch.float64)
    found = Scores(draws, zero, zero).log_prob_leaving_one_out()
    for k in range(7):
        expected = torch.cat([draws[:k], draws[k + 1 :]]).logsumexp(dim=0) - math.log(6)
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def glow():
    return tiny_flow("glow").eval().requires_grad_(False)


def a_split(count=100):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), "u1")
    return Split(pixels, np.arange(count))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_does_not_matter(glow, batch_size):
    split = a_split(20)
    expected = score(glow, split, draws=3, batch_size=6)
    found = score(glow, split, draws=3, batch_size=batch_size)
    for name, shape in (("draws", (3, 20)), ("base", (20,)), ("log_det", (20,))):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == shape and a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * 16)
    loss = mean_loss(glow, split, draws=3, batch_size=batch_size)
    assert loss == pytest.approx(glow.loss(expected.log_prob).mean().item(), abs=1e-5)


def test_noise_depends_on_the_seed_the_place_and_the_draw(glow):
    every = score(glow, a_split()).log_prob
    assert torch.equal(score(glow, a_split()).log_prob, every)
    assert not torch.equal(score(glow, a_split(), seed=1).log_prob, every)
    ten = score(glow, a_split().at(np.arange(10))).log_prob
    torch.testing.assert_close(ten, every[:10], rtol=1e-6, atol=0)
    a, b = score(glow, Split(np.zeros((2, 1, 4, 4), "u1"), np.arange(2))).log_prob
    assert a != b
    several = score(glow, a_split(), draws=4)
    torch.testing.assert_close(several.draws[0], every)
    assert all(len({*draws}) == 4 for draws in several.draws.T.tolist())
    # The parts are those of the first draw.
    torch.testing.assert_close(several.base + several.log_det, several.draws[0])
    x = a_split().take(slice(0, 1))
    base = glow(x, uniform(x.shape, 0, Stream.EVALUATION, 0, 0, x.device)).base
    torch.testing.assert_close(several.base[:1].float(), base, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("draws, expected", [(1, [10, 20]), (2, [5, 10, 15, 20])])
def test_progress_is_reported(glow, draws, expected):
    seen = []
    score(glow, a_split(20), draws=draws, batch_size=10, progress=lambda *done: seen.append(done))
    assert seen == [(done, 20) for done in expected]


def test_what_cannot_be_scored_is_refused(flow, monkeypatch):
    """An activation of the flow has 4 numbers of 8 bytes, and so has a layer's input."""
    monkeypatch.setattr(capacity, "available", lambda device: 10 * 2 * 4 * 8)
    scoring.require_memory(flow, 20, 10, draws=2)
    scoring.require_memory(flow, 10, 10**9)  # no more images than there are
    scoring.require_memory(flow, 20, None, draws=2)
    with pytest.raises(UserError, match="^--batch-size 11: 11 images at a time need at least 0.0 "):
        scoring.require_memory(flow, 20, 11, draws=2)
    with pytest.raises(UserError, match="^--draws 3: the scores of 20 images need"):
        scoring.require_memory(flow, 20, 10, draws=3)

"""Scores of images: their bounds, where the density is known in closed form, and their batches."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_flow
from torch.distributions import Normal

from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.data.splits import Split
from flowtrain.errors import UserError
from flowtrain.evaluation import score as scoring
from flowtrain.evaluation.evaluate import summarize
from flowtrain.evaluation.score import Scores, mean_loss, score
from flowtrain.flow.dequantize import Dequantizer, UniformNoise
from flowtrain.flow.flow import Flow, LogProb
from flowtrain.flow.kinds import kind_of
from flowtrain.system import capacity

LEVELS = 8
SHAPE = (1, 2, 2)
SCALE, SHIFT = 4.0, 0.3


class AllOfTheBin(UniformNoise):
    """Without the edges, which the closed form knows nothing of: exact in float64."""

    def forward(self, noise, x, executor=None):
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


@pytest.mark.run  # takes long
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
@pytest.mark.run
def test_the_error_over_draws_is_what_another_seed_changes(flow, split, k):
    results = [summarize(score(flow, split, samples=k, seed=seed), flow) for seed in range(150)]
    for name in ("loss", "elbo_bits_per_dim"):
        spread = np.std([result[name] for result in results])
        reported = np.sqrt(np.mean([result[f"{name}_stderr_draws"] ** 2 for result in results]))
        # The jackknife of two draws is crude: it is too large rather than too small.
        assert 0.8 * spread < reported < (1.7 if (name, k) == ("loss", 2) else 1.25) * spread, name
        assert results[0][f"{name}_stderr"] > 2 * reported


def test_bounds_of_one_draw_are_the_same(flow, split):
    result = summarize(score(flow, split), flow)
    assert result["bound"] == "elbo" and result["elbo_bits_per_dim"] == pytest.approx(
        result["bits_per_dim"]
    )
    assert result["loss_stderr_draws"] is result["elbo_bits_per_dim_stderr_draws"] is None


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


# ---------------------------------------------------------------- a tiny Glow


@pytest.fixture(scope="module")
def glow():
    return tiny_flow("glow").eval().requires_grad_(False)


def a_split(count=100, shape=(1, 4, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), "u1")
    return Split(pixels, np.arange(count), 0)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.run
def test_batch_size_does_not_matter(glow, batch_size, samples):
    expected = score(glow, a_split(), samples=samples, batch_size=33)
    found = score(glow, a_split(), samples=samples, batch_size=batch_size)
    for name in ("draws", "base", "log_det"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape in ((samples, 100), (100,)) and a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * 16)
    bits = [
        mean_loss(glow, a_split(), samples=samples, batch_size=size) for size in (33, batch_size)
    ]
    assert bits[0] == pytest.approx(bits[1], abs=1e-5)


def test_the_number_of_images_and_the_split_do_not_change_an_images_score(glow):
    every = score(glow, a_split()).log_prob
    ten = score(glow, a_split().at(np.arange(10))).log_prob
    torch.testing.assert_close(ten, every[:10], rtol=1e-6, atol=0)


def test_one_seed_gives_one_figure(glow):
    first, again, other = (score(glow, a_split(), seed=seed).log_prob for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_images_that_are_the_same_get_different_noise(glow):
    split = Split(np.zeros((2, 1, 4, 4), "u1"), np.arange(2), 0)
    a, b = score(glow, split).log_prob
    assert a != b


def test_more_draws_tighten_the_bound(glow):
    means = [score(glow, a_split(), samples=k).log_prob.mean().item() for k in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    k = score(glow, a_split(), samples=4)
    assert torch.equal(k.log_prob, score(glow, a_split(), samples=4).log_prob)
    # The parts are those of the first draw, whose bound is the single-draw one.
    one = score(glow, a_split(), samples=1)
    torch.testing.assert_close(k.base, one.base)
    torch.testing.assert_close(one.base + one.log_det, one.log_prob)


def test_importance_weighted_bound_by_hand():
    class Known(torch.nn.Module):
        """The bound of the k-th draw of every image is -100 * k."""

        device, calls, classes, kind = torch.device("cpu"), 0, 0, kind_of(256)

        def forward(self, x, noise):
            self.calls += 1
            return LogProb(torch.full((len(x),), -100.0 * self.calls), torch.zeros(len(x)))

    # -100 - log 2 and nothing more from the second draw, whose weight is exp(-100): computed as it
    # stands, 0.
    assert score(Known(), a_split(5), samples=2, batch_size=5).log_prob.tolist() == pytest.approx(
        [-100 - math.log(2)] * 5
    )


def test_draws_of_one_image_are_independent(glow):
    # K times the mean of K weights, less K - 1 times that of one fewer, is the weight of the K-th
    # draw.
    split = a_split(20)
    draws = [(score(glow, split, samples=k).log_prob + 100).exp() * k for k in (1, 2, 3)]
    second, third = draws[1] - draws[0], draws[2] - draws[1]
    for a, b in ((draws[0], second), (second, third), (draws[0], third)):
        assert ((a / b).log().abs() > 1e-3).all()


def test_progress_is_reported(glow):
    seen = []
    score(glow, a_split(20), batch_size=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 20), (16, 20), (20, 20)]
    seen.clear()
    score(
        glow,
        a_split(20),
        samples=2,
        batch_size=10,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(5, 20), (10, 20), (15, 20), (20, 20)]


def test_what_cannot_be_scored_is_refused(flow, monkeypatch):
    """An activation of the flow has 4 numbers of 8 bytes, and so has a layer's input."""
    monkeypatch.setattr(capacity, "available", lambda device: 10 * 2 * 4 * 8)
    scoring.require_memory(flow, 20, 10, samples=2)
    scoring.require_memory(flow, 10, 10**9)  # no more images than there are
    scoring.require_memory(flow, 20, None, samples=2)
    with pytest.raises(UserError, match="^--batch-size 11: 11 images at a time need at least 0.0 "):
        scoring.require_memory(flow, 20, 11, samples=2)
    with pytest.raises(UserError, match="^--draws 3: the scores of 20 images need"):
        scoring.require_memory(flow, 20, 10, samples=3)

"""What `evaluate` reports: the bound, its draws, and images whose likelihood is not finite."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from helpers import a_config, npz, tiny_flow

from flowtrain.bijections import Bijection
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, Split
from flowtrain.errors import UserError
from flowtrain.evaluation import evaluate as evaluation
from flowtrain.evaluation.evaluate import evaluate, reconstruction_error, scores_csv
from flowtrain.evaluation.score import LARGEST_BATCH, fitting_batch_size, mean_loss, score
from flowtrain.flow.flow import LogProb


@pytest.fixture(scope="module")
def flow():
    return tiny_flow("glow").eval().requires_grad_(False)


def a_split(count=100, shape=(1, 4, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), "u1")
    return Split(pixels, np.arange(count), 0)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_does_not_matter(flow, batch_size, samples):
    expected = score(flow, a_split(), samples=samples, batch_size=33)
    found = score(flow, a_split(), samples=samples, batch_size=batch_size)
    for name in ("draws", "base", "log_det"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape in ((samples, 100), (100,)) and a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * 16)
    bits = [
        mean_loss(flow, a_split(), samples=samples, batch_size=size) for size in (33, batch_size)
    ]
    assert bits[0] == pytest.approx(bits[1], abs=1e-5)


def test_the_batch_is_chosen_by_memory(flow, monkeypatch):
    assert fitting_batch_size(flow) == LARGEST_BATCH
    sizes = []
    for budget in (1, 2**16, 2**17, 2**19):
        monkeypatch.setattr(evaluation, "ENOUGH_FOR_A_CPU", budget)
        sizes.append(fitting_batch_size(flow))
    assert sizes[0] == 1 < sizes[1] and sizes[2:] == [2 * sizes[1], 8 * sizes[1]]
    assert fitting_batch_size(tiny_flow("glow", width=24)) == sizes[3] // 4


def test_the_number_of_images_and_the_split_do_not_change_an_images_score(flow):
    every = score(flow, a_split()).log_prob
    torch.testing.assert_close(
        score(flow, a_split(), num_images=10).log_prob, every[:10], rtol=1e-6, atol=0
    )
    assert len(score(flow, a_split(), num_images=1000).log_prob) == 100


def test_one_seed_gives_one_figure(flow):
    first, again, other = (score(flow, a_split(), seed=seed).log_prob for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_images_that_are_the_same_get_different_noise(flow):
    split = Split(np.zeros((2, 1, 4, 4), "u1"), np.arange(2), 0)
    a, b = score(flow, split).log_prob
    assert a != b


def test_more_draws_tighten_the_bound(flow):
    means = [score(flow, a_split(), samples=k).log_prob.mean().item() for k in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    k = score(flow, a_split(), samples=4)
    assert torch.equal(k.log_prob, score(flow, a_split(), samples=4).log_prob)
    # The parts are those of the first draw, whose bound is the single-draw one.
    one = score(flow, a_split(), samples=1)
    torch.testing.assert_close(k.base, one.base)
    torch.testing.assert_close(one.base + one.log_det, one.log_prob)


def test_importance_weighted_bound_by_hand():
    class Known(torch.nn.Module):
        """The bound of the k-th draw of every image is -100 * k."""

        device, dims, calls, levels, classes = torch.device("cpu"), 16, 0, 256, 0

        def forward(self, x, noise):
            self.calls += 1
            return LogProb(torch.full((len(x),), -100.0 * self.calls), torch.zeros(len(x)))

    # -100 - log 2 and nothing more from the second draw, whose weight is exp(-100): computed as it
    # stands, 0.
    assert score(Known(), a_split(5), samples=2, batch_size=5).log_prob.tolist() == pytest.approx(
        [-100 - math.log(2)] * 5
    )


def test_draws_of_one_image_are_independent(flow):
    # K times the mean of K weights, less K - 1 times that of one fewer, is the weight of the K-th
    # draw.
    split = a_split(20)
    draws = [(score(flow, split, samples=k).log_prob + 100).exp() * k for k in (1, 2, 3)]
    second, third = draws[1] - draws[0], draws[2] - draws[1]
    for a, b in ((draws[0], second), (second, third), (draws[0], third)):
        assert ((a / b).log().abs() > 1e-3).all()


# ---------------------------------------------------------------- the whole result


def evaluated(tmp_path, flow, count=30, shape=(4, 4, 1), **options):
    section = npz(
        tmp_path / "a.npz",
        train=20,
        test=count,
        shape=shape,
        validation=options.pop("validation", 4),
    )
    config = a_config("glow", data=section)
    model = LoadedModel(flow, config, "raw", Checkpoint(tmp_path / "model", {"step": 12}, {}))
    return evaluate(model, DataSet(config.data), options.pop("split", "test"), **options)


@pytest.mark.parametrize("samples, bound", [(1, "elbo"), (4, "iwbo")])
def test_the_result_says_what_was_measured(tmp_path, flow, samples, bound):
    result, scores = evaluated(tmp_path, flow, samples=samples, seed=3, batch_size=8)
    bits = -scores.log_prob / (16 * math.log(2))
    expected = {
        "bits_per_dim": bits.mean().item(),
        "bits_per_dim_stderr": bits.std(correction=1).item() / math.sqrt(30),
        "nats_per_image": -scores.log_prob.mean().item(),
    }
    assert {key: getattr(result, key) for key in expected} == pytest.approx(expected)
    rest = {
        **{
            "bound": bound,
            "samples": samples,
            "num_images": 30,
            "dims": 16,
            "levels": 256,
            "split": "test",
        },
        **{"dataset": "npz", "weights": "raw", "step": 12, "seed": 3, "non_finite_images": 0},
    }
    assert {key: getattr(result, key) for key in rest} == rest
    assert 0 <= result.max_reconstruction_error < 0.5


@pytest.mark.parametrize("split, count", [("train", 16), ("validation", 4), ("test", 30)])
def test_every_split(tmp_path, flow, split, count):
    assert evaluated(tmp_path, flow, split=split)[0].num_images == count


def test_one_image_has_no_standard_error(tmp_path, flow):
    result, _ = evaluated(tmp_path, flow, num_images=1)
    assert result.bits_per_dim_stderr is None and math.isfinite(result.bits_per_dim)


def test_data_of_another_shape_are_an_error(tmp_path, flow):
    with pytest.raises(UserError, match=r"\(1, 6, 4\) with 256 levels cannot be evaluated"):
        evaluated(tmp_path, flow, shape=(6, 4, 1))
    with pytest.raises(UserError, match="17 levels"):
        evaluated(tmp_path, tiny_flow("glow", q=17))
    with pytest.raises(UserError, match="--split validation: it is empty"):
        evaluated(tmp_path, flow, split="validation", validation=0)


class Spoiled(Bijection):
    """A bijection whose likelihood is not finite for images of a dark first pixel."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x, context=None):
        z, log_det = self.inner(x)
        return z, torch.where(x[:, 0, 0, 0] < -0.3, self.value, log_det)

    def inverse(self, z, context=None):
        return self.inner.inverse(z)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("samples", [1, 2])
def test_images_that_are_not_finite_are_counted(tmp_path, value, samples):
    flow = tiny_flow("glow")
    flow.bijection = Spoiled(flow.bijection, value)
    result, scores = evaluated(tmp_path, flow, samples=samples)
    with np.load(tmp_path / "a.npz") as arrays:
        dark = ((arrays["x_test"][:, 0, 0, 0] + 0.5) / 256 - 0.5 < -0.3).sum()
    assert 0 < dark < 30
    assert result.non_finite_images == pytest.approx(dark, abs=1) and result.num_images == 30
    assert result.bits_per_dim is None and result.nats_per_image is None
    assert len(scores.log_prob) == 30
    assert not math.isfinite(mean_loss(flow, a_split()))


def test_reconstruction_error(flow):
    x = torch.from_numpy(a_split().pixels)
    assert reconstruction_error(flow, x) < 0.5

    class Drifting(Spoiled):
        """Its inverse is off by a quarter of the cube."""

        def inverse(self, z, context=None):
            x, log_det = self.inner.inverse(z)
            return x + 0.25, log_det

    broken = tiny_flow("glow")
    broken.bijection = Drifting(broken.bijection, 0.0)
    assert reconstruction_error(broken, x) == pytest.approx(64, abs=1)  # in levels, of 256


def test_scores_as_csv(tmp_path, flow):
    _, scores = evaluated(tmp_path, flow)
    rows = list(csv.DictReader(io.StringIO(scores_csv(scores, flow).decode())))
    assert list(rows[0]) == ["index", "bits_per_dim", "log_prob", "log_prob_base", "log_det"]
    assert [int(row["index"]) for row in rows] == list(range(30))
    for i, row in enumerate(rows):
        log_prob = float(row["log_prob"])
        assert log_prob == scores.log_prob[i].item()
        assert float(row["log_prob_base"]) + float(row["log_det"]) == pytest.approx(
            log_prob, abs=1e-9
        )
        assert float(row["bits_per_dim"]) == pytest.approx(-log_prob / (16 * math.log(2)))


def test_progress_is_reported(flow):
    seen = []
    score(flow, a_split(20), batch_size=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_images_that_are_not_finite_are_named(tmp_path):
    flow = tiny_flow("glow")
    flow.bijection = Spoiled(flow.bijection, math.nan)
    result, scores = evaluated(tmp_path, flow)
    assert result.non_finite_indices == [i for i in range(30) if math.isnan(scores.log_prob[i])]
    assert 0 < len(result.non_finite_indices) < 30

"""The kinds of data: units, losses, checks of values and random examples."""

import math

import numpy as np
import pytest
import torch
from helpers import seeded

from flowtrain.errors import UserError
from flowtrain.flow.kinds import NoisyImages, Points, QuantizedImages, SurfacePoints, kind_of


def test_levels_and_surface_decide():
    assert type(kind_of(17)) is QuantizedImages and kind_of(17).levels == 17
    assert type(kind_of(17, sigma=0.1)) is NoisyImages and kind_of(17, sigma=0.1).levels == 17
    assert type(kind_of(None)) is Points and kind_of(None).levels is None
    assert type(kind_of(None, on_surface=True)) is SurfacePoints


def test_the_loss_is_in_the_unit():
    log_prob = torch.tensor([-8 * math.log(2)])
    assert (kind_of(256).unit, kind_of(256).metric) == ("bits/dim", "bits_per_dim")
    assert kind_of(256).loss(log_prob, 4).item() == pytest.approx(2)
    assert (kind_of(None).unit, kind_of(None).metric) == ("nats", "nats")
    assert kind_of(None).loss(log_prob, 4).item() == pytest.approx(8 * math.log(2))
    noisy = kind_of(256, sigma=0.1)
    assert (noisy.unit, noisy.metric, noisy.exact) == ("nats/dim", "nats_per_dim", False)
    assert noisy.loss(log_prob, 4).item() == pytest.approx(2 * math.log(2))


def test_what_has_no_bits():
    assert kind_of(256).no_bits is None
    assert "real-valued data have a density" in kind_of(None).no_bits
    assert "Gaussian noise (dequantization.name: gaussian)" in kind_of(17, sigma=0.1).no_bits


def test_what_several_draws_say_together():
    draws = torch.tensor([[0.0, 1.0], [math.log(3), 5.0]])
    for kind in (kind_of(256), kind_of(None)):  # the log of the mean probability
        assert kind.over_draws(draws)[0].item() == pytest.approx(math.log(2))
    assert kind_of(256, sigma=0.1).over_draws(draws).tolist() == pytest.approx(
        [math.log(3) / 2, 3.0]
    )


def test_scores_of_images_are_in_the_unit():
    assert kind_of(16).uniform_loss == 4 and kind_of(16).in_unit(np.array([3.0]))[0] == 3
    noisy = kind_of(16, sigma=0.1)  # a uniform density on the cube is 1
    assert noisy.uniform_loss == 0
    assert noisy.in_unit(np.array([3.0]))[0] == pytest.approx(3 * math.log(2))


def test_faults():
    assert kind_of(17).fault(np.array([16])) is None
    assert kind_of(17).fault(np.array([0, 17])) == "a value of 17, expected 0..16"
    assert kind_of(None).fault(np.array([1e9])) is None
    assert kind_of(None).fault(np.array([0, np.nan])) == "a value that is not finite"


def test_fewer_bits():
    kind = kind_of(256).reduced(3)
    assert (kind.levels, kind.words, kind.scale, kind.npz()) == (
        32,
        "32 levels",
        32,
        {"levels": 32},
    )
    assert kind_of(None).reduced(0).words == "real values"


def test_random_examples():
    x = kind_of(3).random((50, 1, 2, 2), seeded(0))
    assert x.dtype == torch.uint8 and set(x.flatten().tolist()) == {0, 1, 2}
    on_sphere = SurfacePoints().random((50, 3, 1, 1), seeded(0))
    torch.testing.assert_close(on_sphere.norm(dim=1).flatten(), torch.ones(50))
    assert Points().random((50, 3, 1, 1), seeded(0)).norm(dim=1).std() > 0.1


def test_uniform_examples_fill_the_range():
    given = torch.tensor([-3.0, 5.0]).reshape(2, 1, 1, 1).expand(-1, 100, 1, 1)
    x = Points().uniform_like(given, seeded(0))
    assert x.shape == given.shape and x.min() >= -3 and x.max() <= 5 and x.max() - x.min() > 7
    assert Points().levels_per_unit(given) == 32 and kind_of(17).levels_per_unit(given) == 17
    images = kind_of(17).uniform_like(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), seeded(0))
    assert images.shape == (9, 1, 8, 8) and images.max() == 16


def test_levels_are_required():
    assert kind_of(17).require_levels("unused") == 17
    with pytest.raises(UserError, match="no images"):
        Points().require_levels("no images")

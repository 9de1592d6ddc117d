"""The kinds of data: units, losses, checks of values and random examples."""

import math

import numpy as np
import pytest
import torch
from helpers import seeded

from flowtrain.flow.kinds import NoisyImages, Points, QuantizedImages, SurfacePoints, kind_of

IMAGES, NOISY, POINTS = kind_of(16), kind_of(16, sigma=0.1), kind_of(None)
LN2, LN3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    "kind, type_of, unit, loss, draws, no_bits",
    [
        (IMAGES, QuantizedImages, "bits/dim", 2, LN2, None),
        (NOISY, NoisyImages, "nats/dim", 2 * LN2, LN3 / 2, "Gaussian noise"),
        (POINTS, Points, "nats", 8 * LN2, LN2, "real-valued data have a density"),
        (kind_of(None, True), SurfacePoints, "nats", 8 * LN2, LN2, "real-valued data"),
    ],
)
def test_each_kind(kind, type_of, unit, loss, draws, no_bits):
    levels = None if isinstance(kind, Points) else 16
    assert type(kind) is type_of and kind.num_bins == levels
    assert kind.unit == unit
    assert kind.loss(torch.tensor([-8 * LN2]), 4).item() == pytest.approx(loss)
    # The log of the mean probability, or the mean log-density of noisy images.
    together = kind.over_draws(torch.tensor([[0.0, -999.0], [LN3, -999 + LN3]])).tolist()
    assert together == pytest.approx([draws, draws - 999])  # as a probability, it would be 0
    assert (kind.no_bits is None) == (no_bits is None) and (no_bits or "") in (kind.no_bits or "")
    assert kind.exact == (levels is None) and kind.on_surface == (type_of is SurfacePoints)


def test_scores_of_images_are_in_the_unit():
    assert IMAGES.uniform_loss == 4 and IMAGES.in_unit(np.array([3.0]))[0] == 3
    assert NOISY.uniform_loss == 0  # a uniform density on the cube is 1
    assert NOISY.in_unit(np.array([3.0]))[0] == pytest.approx(3 * LN2)


def test_faults():
    assert kind_of(17).fault(np.array([16], np.uint8)) is None
    assert kind_of(17).fault(np.array([0, 17])) == "a value of 17, expected 0..16"
    assert POINTS.fault(np.array([1e9])) is None
    assert POINTS.fault(np.array([0, np.nan])) == "a value that is not finite"


def test_random_examples():
    x = kind_of(3).random((50, 1, 2, 2), seeded(0))
    assert x.dtype == torch.uint8 and set(x.flatten().tolist()) == {0, 1, 2}
    on_sphere = SurfacePoints().random((50, 3, 1, 1), seeded(0))
    torch.testing.assert_close(on_sphere.norm(dim=1).flatten(), torch.ones(50))
    assert POINTS.random((50, 3, 1, 1), seeded(0)).norm(dim=1).std() > 0.1
    given = torch.tensor([-3.0, 5.0]).reshape(2, 1, 1, 1).expand(-1, 100, 1, 1)
    x = POINTS.uniform_like(given, seeded(0))
    assert x.shape == given.shape and x.min() >= -3 and x.max() <= 5 and x.max() - x.min() > 7
    units = torch.logspace(-9, 9, 100).view(100, 1, 1)
    in_units = POINTS.uniform_like(units * given, seeded(0))
    torch.testing.assert_close(in_units, units * x, rtol=1e-3, atol=0)
    assert POINTS.levels_per_unit(given) == 32 and IMAGES.levels_per_unit(given) == 16
    images = kind_of(17).uniform_like(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), seeded(0))
    assert images.shape == (9, 1, 8, 8) and images.max() == 16

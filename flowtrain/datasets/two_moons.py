"""Two moons: interleaved half circles of radius 1 (scikit-learn's `make_moons`), centred."""

from pathlib import Path

import numpy as np
from pydantic import NonNegativeFloat

from flowtrain.datasets.base import Images, Part
from flowtrain.datasets.points import real_valued
from flowtrain.types import Count


def build(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    noise: NonNegativeFloat = 0.05,
) -> Images:
    """Points of the plane. `root` is not used.

    Args:
        count: Number of points to train on, of which `data.validation` are held out.
        test_count: Number of points in the test split.
        noise: Standard deviation of the noise on each point.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        from sklearn.datasets import make_moons

        points: np.ndarray = make_moons(n, noise=noise, random_state=random)[0]
        points -= [0.5, 0.25]
        return points

    return real_valued(split, seed, count, test_count, generate)

"""Four rings, of radius 0.6 to 2.4."""

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
        angle = random.uniform(0, 2 * np.pi, n)
        radius = 0.6 * random.randint(1, 5, size=n)
        points: np.ndarray = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points += noise * random.standard_normal((n, 2))
        return points

    return real_valued(split, seed, count, test_count, generate)

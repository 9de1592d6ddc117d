"""Eight Gaussians on a circle of radius 2."""

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
    noise: NonNegativeFloat = 0.2,
) -> Images:
    """Points of the plane. `root` is not used.

    Args:
        count: Number of points to train on, of which `data.validation` are held out.
        test_count: Number of points in the test split.
        noise: Standard deviation of each Gaussian.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        angle = random.randint(8, size=n) * np.pi / 4
        centre = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return centre + noise * random.standard_normal((n, 2))

    return real_valued(split, seed, count, test_count, generate)

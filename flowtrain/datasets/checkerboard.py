"""A checkerboard: uniform on every other square of side 1 in [-2, 2] x [-2, 2]."""

from pathlib import Path

import numpy as np

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
) -> Images:
    """Points of the plane. `root` is not used.

    Args:
        count: Number of points to train on, of which `data.validation` are held out.
        test_count: Number of points in the test split.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        x = random.uniform(-2, 2, n)
        y = random.uniform(0, 1, n) - random.randint(2, size=n) * 2 + np.floor(x) % 2
        return np.stack([x, y], axis=1)

    return real_valued(split, seed, count, test_count, generate)

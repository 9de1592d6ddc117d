"""A pinwheel (Johnson et al. 2016), whose Gaussian arms turn more the farther out they are."""

from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Part
from flowtrain.datasets.points import real_valued
from flowtrain.types import Count, Positive


def build(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    arms: Positive = 5,
) -> Images:
    """Points of the plane. `root` is not used.

    Args:
        count: Number of points to train on, of which `data.validation` are held out.
        test_count: Number of points in the test split.
        arms: Number of arms.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        radial, tangential = 0.3 * random.standard_normal(n) + 1, 0.1 * random.standard_normal(n)
        angle = 2 * np.pi * random.randint(arms, size=n) / arms + 0.25 * np.exp(radial)
        along = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        across = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
        points: np.ndarray = radial[:, None] * along + tangential[:, None] * across
        points *= 1.5
        return points

    return real_valued(split, seed, count, test_count, generate)

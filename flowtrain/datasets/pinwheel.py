"""A pinwheel: Gaussians of five arms, turned the more the farther they are from the centre (Johnson
et al. 2016).
"""

from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Split
from flowtrain.datasets.points import Count, real_valued


def build(
    root: Path,
    split: Split,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    arms: Count = 5,
) -> Images:
    """`count` points to train on, `test_count` to test with; `arms` of the wheel. `root` is not
    used.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        radial, tangential = 0.3 * random.standard_normal(n) + 1, 0.1 * random.standard_normal(n)
        angle = 2 * np.pi * random.randint(arms, size=n) / arms + 0.25 * np.exp(radial)
        along = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        across = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
        return 1.5 * (radial[:, None] * along + tangential[:, None] * across)

    return real_valued(split, seed, count, test_count, generate)

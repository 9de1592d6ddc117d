"""Four rings, of radius 0.6 to 2.4."""

from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Split
from flowtrain.datasets.points import Count, Noise, real_valued


def build(
    root: Path,
    split: Split,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    noise: Noise = 0.05,
) -> Images:
    """`count` points to train on, `test_count` to test with; `noise` is a standard deviation.
    `root` is not used.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        angle = random.uniform(0, 2 * np.pi, n)
        radius = 0.6 * random.randint(1, 5, size=n)
        points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return points + noise * random.standard_normal((n, 2))

    return real_valued(split, seed, count, test_count, generate)

"""Two arms of a spiral."""

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
    noise: Noise = 0.1,
) -> Images:
    """`count` points to train on, `test_count` to test with; `noise` is a standard deviation.
    `root` is not used.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        angle = 1.5 * 2 * np.pi * np.sqrt(random.uniform(0, 1, n))
        arm = (-1) ** random.randint(2, size=n)
        points = (arm * angle / 3)[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1)
        return points + noise * random.standard_normal((n, 2))

    return real_valued(split, seed, count, test_count, generate)

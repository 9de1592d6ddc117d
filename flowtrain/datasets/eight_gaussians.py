"""Eight Gaussians on a circle of radius 2."""

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
    noise: Noise = 0.2,
) -> Images:
    """`count` points to train on, `test_count` to test with; `noise` is the deviation of each.
    `root` is not used.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        angle = random.randint(8, size=n) * np.pi / 4
        centre = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return centre + noise * random.standard_normal((n, 2))

    return real_valued(split, seed, count, test_count, generate)

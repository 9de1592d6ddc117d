"""Two moons: interleaved half circles of radius 1 (scikit-learn's `make_moons`), centred."""

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
        from sklearn.datasets import make_moons

        return make_moons(n, noise=noise, random_state=random)[0] - np.array([0.5, 0.25])

    return real_valued(split, seed, count, test_count, generate)

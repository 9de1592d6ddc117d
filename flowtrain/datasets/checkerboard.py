"""A checkerboard: uniform on every other square of side 1 in [-2, 2] x [-2, 2]."""

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
) -> Images:
    """`count` points to train on, `test_count` to test with. `root` is not used."""

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        x = random.uniform(-2, 2, n)
        y = random.uniform(0, 1, n) - random.randint(2, size=n) * 2 + np.floor(x) % 2
        return np.stack([x, y], axis=1)

    return real_valued(split, seed, count, test_count, generate)

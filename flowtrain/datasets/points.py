"""What the two-dimensional data sets share: real-valued points `(2, 1, 1)`, as many as are asked
for, by seed.
"""

from collections.abc import Callable

import numpy as np

from flowtrain.datasets.base import Images, Part, frozen_random

Generate = Callable[[np.random.RandomState, int], np.ndarray]  # randomness and N to (N, dims)


def real_valued(
    split: Part, seed: int, count: int, test_count: int, generate: Generate, dims: int = 2
) -> Images:
    """`count` points to train on, `test_count` to test with, both functions of the seed alone."""

    def read() -> np.ndarray:
        test = split == "test"
        points = generate(frozen_random(seed, int(test)), test_count if test else count)
        return np.ascontiguousarray(points.reshape(-1, dims, 1, 1), dtype=np.float32)

    return Images(shape=(dims, 1, 1), levels=None, read=read)

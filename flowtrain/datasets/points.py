"""What the data sets of points share: a seed gives as many real-valued points as are asked for."""

from collections.abc import Callable

import numpy as np

from flowtrain.datasets.base import Images, Part, frozen_random

Generate = Callable[[np.random.RandomState, int], np.ndarray]  # randomness and N to (N, dims)


def real_valued(
    split: Part, seed: int, count: int, test_count: int, generate: Generate, dims: int = 2
) -> Images:
    """`count` points to train on or `test_count` to test with, `(dims, 1, 1)`.

    Both are functions of the seed alone.
    """

    def read() -> np.ndarray:
        test = split == "test"
        points = generate(frozen_random(seed, int(test)), test_count if test else count)
        return np.ascontiguousarray(points.reshape(-1, dims, 1, 1), dtype=np.float32)

    return Images(shape=(dims, 1, 1), levels=None, read=read)

"""The 8x8 handwritten digits that ship inside scikit-learn: no download.

1,797 images, the test part of https://archive.ics.uci.edu/dataset/80 (Alpaydin & Kaynak, 1998).
"""

from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Part, digests, first_equal, part_of


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """1x8x8 images with 17 levels. A seeded tenth (180) is the test split."""

    def all_of(name: str) -> np.ndarray:
        from sklearn.datasets import load_digits

        values: np.ndarray = load_digits()[name]
        return values

    def read() -> np.ndarray:
        return all_of("images")[:, None].astype(np.uint8)  # (N, 1, 8, 8), floats 0..16

    def labels() -> np.ndarray:
        return all_of("target").astype(np.int64)

    def rows() -> np.ndarray:
        return part_of(first_equal(digests(read())), split, seed)

    return Images(shape=(1, 8, 8), num_bins=17, read=read, labels=labels, rows=rows)

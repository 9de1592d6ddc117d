"""The 8x8 handwritten digits that ship inside scikit-learn: no download.

1,797 images, the test part of https://archive.ics.uci.edu/dataset/80 (Alpaydin & Kaynak, 1998).
"""

from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Part, contiguous, part_of


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """1x8x8 images with 17 levels. A seeded tenth (180) is the test split. `root` is not used."""

    def part(of: str) -> np.ndarray:
        from sklearn.datasets import load_digits

        return part_of(load_digits()[of], split, seed)

    def read() -> np.ndarray:
        return contiguous(part("images")[:, None])  # (N, 1, 8, 8), floats 0..16

    def labels() -> np.ndarray:
        return part("target").astype(np.int64)

    return Images(shape=(1, 8, 8), levels=17, read=read, labels=labels)

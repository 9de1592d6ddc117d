"""The digits of scikit-learn."""

import numpy as np
from dataset_helpers import check

from flowtrain.datasets import digits


def test_digits(tmp_path):
    parts = {s: digits.build(tmp_path, s) for s in ("train", "test")}
    train, test = check(parts["train"], 1617), check(parts["test"], 180)
    assert parts["train"].shape == (1, 8, 8) and parts["train"].levels == 17
    assert train.max() == 16 and not parts["train"].flip
    from sklearn.datasets import load_digits

    every = load_digits().images.reshape(1797, -1).astype(np.uint8)
    both = np.concatenate([train, test]).reshape(1797, -1)
    assert np.array_equal(every[np.lexsort(every.T)], both[np.lexsort(both.T)])
    assert not np.array_equal(check(digits.build(tmp_path, "test", seed=1)), test)

"""The splits of a data set, their fingerprint, and options that do not fit it."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from helpers import a_config, npz

from flowtrain.data.splits import DataSet, Split, labels_for
from flowtrain.datasets.mapped import Mapped
from flowtrain.errors import UserError


def data_set(section):
    return DataSet(a_config("nice", data=section).data)


def test_splits_are_disjoint_and_fixed_by_their_seed(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), "u1")
    stored = np.concatenate([x, x])
    np.savez(tmp_path / "a.npz", x_train=stored)
    section = {"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0.2}
    data = data_set(section)
    splits = [data.split(name) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [144, 36, 20]
    assert sorted(i for split in splits for i in split.indices) == list(range(200))
    assert sum(len({i % 100 for i in split.indices}) for split in splits) == 100
    for split in splits:
        expected = stored[split.indices].transpose(0, 3, 1, 2)
        assert np.array_equal(split.take(slice(None)), expected)
    held = splits[1].indices
    assert np.array_equal(data_set(section).split("validation").indices, held)
    other = data_set({**section, "split_seed": 1}).split("validation").indices
    assert not np.array_equal(other, held)
    assert data.fingerprint["duplicates"] == 90
    assert data.equal_to_training(splits[2]) == 0


def test_a_sample_of_sorted_images_has_all_classes():
    pixels = np.repeat(np.arange(10, dtype="u1"), 30).reshape(-1, 1, 1, 1)
    labels, names = lambda: pixels[:, 0, 0, 0].astype(int), lambda: [*map(str, range(300))]
    split = Split(pixels, np.arange(300), None, labels, names)
    found = split.sample(100, seed=1)
    assert found.names == [*map(str, found.indices)]
    assert len(set(found.labels.tolist())) == 10 and np.all(np.diff(found.indices) > 0)
    assert set(split.sample(20, seed=1).indices) < set(found.indices)
    assert not np.array_equal(split.sample(100).indices, found.indices)
    assert np.array_equal(split.sample(1000).indices, split.indices)


def test_images_with_256_levels_are_reduced(tmp_path):
    section = npz(tmp_path / "a.npz")
    stored = data_set(section).split("test").take(slice(None))
    data = DataSet(a_config("nice", data=section).data, levels=17)
    x = data.split("test").take(slice(None))
    assert data.num_bins == 17 and torch.equal(x, (stored.double() / 255 * 16).round().byte())
    assert DataSet(a_config("nice", data={"name": "digits"}).data, levels=9).num_bins == 17
    for n_bits in (1, 5):
        data = DataSet(a_config("nice", data={**section, "n_bits": n_bits}).data, levels=9)
        test, expected = data.split("test"), stored >> (8 - n_bits)
        x = test.take(slice(None))
        assert torch.equal(x, expected) and x.dtype == torch.uint8 and data.num_bins == 2**n_bits
        x.zero_()  # a copy
        assert torch.equal(test.take(np.array([1])), expected[1:2])


def test_options_that_do_not_fit(tmp_path):
    digits, points = {"name": "digits"}, {"name": "two_moons"}
    flat = npz(tmp_path / "a.npz", shape=(2, 8, 1))
    assert len(data_set({**flat, "shift": 1}).split("test")) == 4
    for section, message in (
        ({**digits, "n_bits": 5}, "data.n_bits: digits has 17 levels"),
        ({**points, "n_bits": 5}, "data.n_bits: two_moons has real"),
        ({**points, "flip": True}, "data.flip: two_moons has no images"),
        ({**points, "shift": 1}, "data.shift: two_moons has no images"),
        ({**digits, "validation": 2.5}, "data.validation: cannot hold out 2.5"),
        ({**flat, "shift": 2}, "data.shift: 2"),
    ):
        with pytest.raises(UserError, match=message):
            data_set(section).split("train")


def test_images_of_the_test_split_that_are_in_the_training_split_are_counted(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), "u1")
    np.savez(tmp_path / "a.npz", x_train=x, x_test=x[:40])
    data = data_set({"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0.5})
    test = data.split("test")
    assert len(test) == 40  # none is moved
    trained = set(data.split("train").indices.tolist())
    for count in (40, 15):
        assert data.equal_to_training(test.at(slice(count))) == len(trained & set(range(count)))
    assert data.equal_to_training(data.split("validation")) == 0
    assert "duplicates" not in data.fingerprint
    # Training images that are not at hand are not read.
    data.train_images = dataclasses.replace(data.train_images, at_hand=lambda: False)
    assert data.equal_to_training(test) is None


def test_the_fingerprint_tells_data_apart(tmp_path):
    section = npz(tmp_path / "a.npz", train=40, validation=4)
    base = data_set(section).fingerprint
    assert base == data_set(section).fingerprint
    expected = {"train": 36, "validation": 4, "shape": [1, 8, 8], "levels": 256, "split_seed": 0}
    assert base.items() >= expected.items()
    with np.load(section["path"]) as arrays:
        arrays = {key: arrays[key].copy() for key in arrays.files}
    arrays["x_train"][17, 3, 3, 0] ^= 1
    np.savez(tmp_path / "b.npz", **arrays)
    other = {"path": str(tmp_path / "b.npz"), "split_seed": 1, "validation": 5, "n_bits": 5}
    for key, value in (other | {"flip": True, "shift": 1, "max_in_memory": 0}).items():
        found = data_set({**section, key: value}).fingerprint
        assert (found != base) == (key in other), key


def test_mapped_images_are_read_once_for_splits_and_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flowtrain.datasets.npz.MAPPED", 0)
    x = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), "u1")
    np.savez(tmp_path / "a.npz", x_train=np.concatenate([x, x[:30]]))
    section = {"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0.2}
    fingerprint = data_set(section).fingerprint
    monkeypatch.setattr(Mapped, "__getitem__", lambda *args: pytest.fail("read again"))
    assert data_set(section).fingerprint == fingerprint
    assert data_set({**section, "split_seed": 1}).fingerprint != fingerprint


def test_labels_that_do_not_fit():
    labels = torch.tensor([0, 2])
    assert labels_for(3, labels, "x") is labels and len(labels_for(3, labels[:0], "x")) == 0
    for wrong, message in ((None, "no labels"), (labels + 1, "1..3"), (labels - 1, "-1..1")):
        with pytest.raises(UserError, match=f"model.classes: 3, but x has .*{message}"):
            labels_for(3, wrong, "x")


@pytest.mark.parametrize(
    "images, read, message",
    [
        ("(1, 4, 4), 10", "np.full((5, 1, 4, 4), 10, 'u1')", "a value of 10, expected 0..9"),
        ("(1, 4, 4), 256", "np.zeros((5, 1, 4, 5), 'u1')", r"5 im.* \(1, 4, 5\), expected \(1, 4"),
        ("(1, 4, 4), 256", "np.zeros((0, 1, 4, 4), 'u1')", "0 images"),
        ("(1, 4, 4), 256", "np.zeros((5, 1, 4, 4), 'f4')", "type float32, expected uint8"),
        ("(1, 4 + (split == 'test'), 4), 256", "None", "test images have shape"),
        ("(1, 4, 4), 256", "None) and (None", "of users_own.images returned a NoneType"),
        ("(5, 4, 4), 256", "None", "data: it has 5 channels, and images have 1 or 3"),
    ],
)
def test_a_data_set_that_breaks_its_promise(tmp_path, monkeypatch, images, read, message):
    (tmp_path / "users_own").mkdir()
    (tmp_path / "users_own" / "images.py").write_text(
        "import numpy as np\nfrom flowtrain.datasets.base import Images\n"
        f"def build(root, split, *, seed=0):\n    return Images({images}, lambda: {read})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("users_own")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=message):
        data_set({"name": "users_own.images"}).split("train")

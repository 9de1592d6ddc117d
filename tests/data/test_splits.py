"""The splits of a data set, their fingerprint, and options that do not fit it."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from helpers import SHARED, a_config, npz, shared

from flowtrain import config as configuration
from flowtrain.data.splits import DataSet, Split
from flowtrain.datasets.base import hold_out
from flowtrain.datasets.mapped import Mapped
from flowtrain.errors import UserError


def data_set(section):
    return DataSet(a_config("nice", data=section).data)


def test_splits_are_disjoint_and_fixed_by_their_seed(tmp_path):
    section = npz(tmp_path / "a.npz", train=40, test=6, validation=0.25)
    splits = {name: data_set(section).split(name) for name in ("train", "validation", "test")}
    assert [len(s) for s in splits.values()] == [30, 10, 6]
    assert set(splits["train"].indices) | set(splits["validation"].indices) == set(range(40))
    assert np.array_equal(
        data_set(section).split("validation").indices, splits["validation"].indices
    )
    other = data_set({**section, "split_seed": 1}).split("validation").indices
    assert not np.array_equal(other, splits["validation"].indices)
    with np.load(section["path"]) as arrays:
        assert np.array_equal(
            splits["test"].take(slice(None)), arrays["x_test"].transpose(0, 3, 1, 2)
        )
        expected = arrays["x_train"].transpose(0, 3, 1, 2)[splits["train"].indices]
        assert np.array_equal(splits["train"].take(slice(None)), expected)


def test_a_sample_of_sorted_images_has_all_classes():
    pixels = np.repeat(np.arange(10, dtype="u1"), 30).reshape(-1, 1, 1, 1)
    split = Split(pixels, np.arange(300), 0, lambda: pixels[:, 0, 0, 0].astype(int))
    found = split.sample(100, seed=1)
    assert len(set(found.labels.tolist())) == 10 and np.all(np.diff(found.indices) > 0)
    assert set(split.sample(20, seed=1).indices) < set(found.indices)
    assert not np.array_equal(split.sample(100).indices, found.indices)
    assert np.array_equal(split.sample(1000).indices, split.indices)


@pytest.mark.parametrize("validation, held", [(0, 0), (5, 5), (0.5, 20), (0.01, 1), (39, 39)])
def test_validation_is_a_count_or_a_fraction(tmp_path, validation, held):
    data = data_set(npz(tmp_path / "a.npz", train=40, validation=validation))
    assert (len(data.split("train")), len(data.split("validation"))) == (40 - held, held)


@pytest.mark.parametrize("validation", [40, 100, 2.5])
def test_impossible_validation(tmp_path, validation):
    with pytest.raises(UserError, match="data.validation"):
        data_set(npz(tmp_path / "a.npz", train=40, validation=validation)).split("train")


def doubled(path, **arrays):
    """Saves each array twice, one after the other, and gives the `data` section that reads it."""
    np.savez(path, **{key: np.concatenate([array, array]) for key, array in arrays.items()})
    return {"name": "npz", "path": str(path), "validation": 0.2}


def test_equal_images_are_in_one_split(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), "u1")
    data = data_set(doubled(tmp_path / "a.npz", x_train=x))
    found = {
        name: [image.numpy().tobytes() for image in data.split(name).take(slice(None))]
        for name in ("train", "validation", "test")
    }
    assert {name: len(images) for name, images in found.items()} == {
        "train": 144, "validation": 36, "test": 20
    }  # fmt: skip
    assert len(set().union(*found.values())) == sum(len(set(images)) for images in found.values())
    assert data.fingerprint["duplicates"] == 90
    assert data.equal_to_training(data.split("test")) == 0


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


@pytest.mark.run  # takes long
@shared
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_splits_of_real_data_are_as_ever(name):
    section = {"name": "mnist", "root": str(SHARED)}
    if name == "cifar10":
        section = {"name": "npz", "path": str(SHARED / "cifar10.npz")}
    data = data_set(section)
    split = data.split("validation")
    count = len(data.split("train")) + len(split)
    validation = data.config.validation
    assert np.array_equal(split.indices, hold_out(count, validation, data.config.split_seed)[1])
    assert "duplicates" not in data.fingerprint
    assert data.equal_to_training(data.split("test")) == 0


def test_training_images_that_are_not_at_hand_are_not_read(tmp_path):
    section = npz(tmp_path / "a.npz", train=40)
    data = data_set(section)
    data.train_images = dataclasses.replace(data.train_images, at_hand=lambda: False)
    assert data.equal_to_training(data.split("test")) is None


def test_nothing_is_read_before_a_split_is_asked_for(tmp_path):
    data = data_set({"name": "cifar10", "root": str(tmp_path / "none")})
    assert (data.shape, data.levels) == ((3, 32, 32), 256)
    assert not (tmp_path / "none").exists()


def test_the_fingerprint_tells_data_apart(tmp_path):
    section = npz(tmp_path / "a.npz", train=40, validation=4)
    base = data_set(section).fingerprint
    assert base == data_set(section).fingerprint
    assert (
        base["train"] == 36
        and base["validation"] == 4
        and base["shape"] == [1, 8, 8]
        and base["levels"] == 256
    )
    with np.load(section["path"]) as arrays:
        arrays = {key: arrays[key].copy() for key in arrays.files}
    arrays["x_train"][17, 3, 3, 0] ^= 1
    np.savez(tmp_path / "b.npz", **arrays)
    for change in (
        {"path": str(tmp_path / "b.npz")},
        {"split_seed": 1},
        {"validation": 5},
        {"n_bits": 5},
    ):
        assert data_set({**section, **change}).fingerprint != base, change
    for same in ({"flip": True}, {"shift": 1}, {"max_in_memory": 0}):
        assert data_set({**section, **same}).fingerprint == base, same


@pytest.mark.parametrize("own_test", [True, False])
def test_mapped_images_are_split_like_those_in_memory(tmp_path, monkeypatch, own_test):
    """And from the second time on, nothing is read for it."""
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "cache"))
    x = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), "u1")
    arrays = {"x_train": np.concatenate([x, x[:30]])} | ({"x_test": x[:9]} if own_test else {})
    np.savez(tmp_path / "a.npz", **arrays)
    section = {"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0.2, "n_bits": 5}
    read = data_set(section)
    monkeypatch.setattr("flowtrain.datasets.npz.MAPPED", 0)
    mapped = data_set(section)
    for name in ("train", "validation", "test"):
        assert np.array_equal(mapped.split(name).indices, read.split(name).indices)
        both = [data.split(name).take(slice(None)) for data in (mapped, read)]
        assert torch.equal(*both) and isinstance(mapped.split(name).pixels, Mapped)
    test = mapped.split("test")
    assert mapped.equal_to_training(test) == read.equal_to_training(read.split("test"))
    assert mapped.fingerprint.keys() == read.fingerprint.keys()
    monkeypatch.setattr(Mapped, "__getitem__", lambda *args: pytest.fail("read again"))
    assert data_set(section).fingerprint == mapped.fingerprint
    assert data_set({**section, "split_seed": 1}).fingerprint != mapped.fingerprint


@pytest.mark.parametrize("n_bits", [1, 4, 5, 8])
def test_n_bits_keeps_the_upper_bits(tmp_path, n_bits):
    section = npz(tmp_path / "a.npz", validation=5, n_bits=n_bits)
    data = data_set(section)
    assert data.levels == 2**n_bits
    with np.load(section["path"]) as arrays:
        expected = arrays["x_test"].transpose(0, 3, 1, 2) // 2 ** (8 - n_bits)
    assert np.array_equal(data.split("test").take(slice(None)), expected)
    x = data.split("train").take(slice(None))
    assert x.dtype == torch.uint8 and 0.9 * 2**n_bits < int(x.max()) + 1 <= 2**n_bits


def test_taking_images_leaves_the_array_alone():
    pixels = np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4)
    split = Split(pixels, np.array([3, 1]), 0)
    split.take(slice(None)).zero_()
    assert np.array_equal(pixels.flatten(), np.arange(64))
    assert split.take(np.array([1]))[0, 0, 0, 0] == 16


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "digits", "n_bits": 5}, "data.n_bits: digits has 17 levels"),
        ({"name": "digits", "shift": 8}, "data.shift: 8"),
    ],
)
def test_options_that_do_not_fit(section, message):
    with pytest.raises(UserError, match=message):
        data_set(section)


def test_a_shift_leaves_something_of_the_shorter_side(tmp_path):
    data_set(npz(tmp_path / "a.npz", shape=(2, 8, 1), shift=1))
    with pytest.raises(UserError, match="data.shift: 2"):
        data_set(npz(tmp_path / "a.npz", shape=(2, 8, 1), shift=2))


@pytest.mark.parametrize(
    "images, read, message",
    [
        ("(1, 4, 4), 10", "np.full((5, 1, 4, 4), 10, 'u1')", "a value of 10, expected 0..9"),
        (
            "(1, 4, 4), 256",
            "np.zeros((5, 1, 4, 5), 'u1')",
            r"5 images of shape \(1, 4, 5\), expected \(1, 4, 4\)",
        ),
        ("(1, 4, 4), 256", "np.zeros((0, 1, 4, 4), 'u1')", "0 images"),
        ("(1, 4 + (split == 'test'), 4), 256", "None", "test images have shape"),
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
    configuration.component_schema.cache_clear()
    with pytest.raises(UserError, match=message):
        data_set({"name": "users_own.images"}).split("train")

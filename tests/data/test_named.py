"""Data that a command line names."""

import functools
import json
import re

import numpy as np
import pytest
from catalogue import SMALL, sets
from cli_helpers import FOLDER, quick, tree
from helpers import a_config, npz
from PIL import Image

from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet


def named(name, own, shape=(3, 8, 8)):
    """The data set that a name stands for, beside a model's own."""
    own = a_config("nice", data=own).data
    config = a_config("nice", data=section_named(str(name), own, shape, "--data")).data
    return DataSet(config, undivided(config, own))


def pictures(folder, count, size=(8, 8)):
    """Pictures of one grey each: 10, 20, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i + 10,) * 3).save(folder / f"{i}.png")
    return folder


def values(data, split="all"):
    return data.split(split).take(slice(None))[:, 0, 0, 0].tolist()


def test_what_fits_another_data_set_comes_from_the_models_own(tmp_path):
    own = npz(
        tmp_path / "a.npz",
        n_bits=5,
        split_seed=3,
        root=str(tmp_path),
        layout="nchw",
        shape=(3, 8, 8),
    )
    mnist = section_named("mnist", a_config("nice", data=own).data, (3, 8, 8), "--data")
    assert (mnist["name"], mnist["n_bits"], mnist["split_seed"], mnist["root"]) == (
        "mnist",
        5,
        3,
        str(tmp_path),
    )
    assert not {"path", "layout"} & set(mnist)
    np.savez(
        tmp_path / "b.npz",
        x_train=np.zeros((4, 1, 4, 4), "u1"),
        x_test=np.zeros((2, 1, 4, 4), "u1"),
    )
    other = named(tmp_path / "b.npz", own)
    assert (other.config.layout, other.shape, other.levels, other.undivided) == (
        "nchw",
        (1, 4, 4),
        32,
        False,
    )
    folder = named(pictures(tmp_path / "p", 3), own, shape=(1, 6, 4))
    assert (folder.shape, folder.config.resize) == ((1, 6, 6), "crop")
    own = {"name": "folder", "path": str(tmp_path / "p"), "size": 8, "resize": "stretch"}
    assert named(pictures(tmp_path / "q", 3), own).config.resize == "stretch"


def test_all_images_of_a_folder_without_splits(tmp_path):
    own = npz(tmp_path / "a.npz")
    data = named(pictures(tmp_path / "p", 12, (20, 16)), own)
    assert data.undivided and data.shape == (3, 8, 8)
    names = sorted(str(i) for i in range(12))
    assert values(data) == [10 * int(i) + 10 for i in names]
    assert values(named(pictures(tmp_path / "one", 1), own)) == [10]
    assert values(named(tmp_path / "p" / "4.png", own)) == [50]


def test_a_folder_with_a_test_part_keeps_its_splits(tmp_path):
    pictures(tmp_path / "p" / "train", 5)
    pictures(tmp_path / "p" / "test", 2)
    data = named(tmp_path / "p", npz(tmp_path / "a.npz"))
    assert not data.undivided and values(data, "test") == [10, 20]


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_all_images_of_a_file_without_splits(tmp_path, layout):
    pixels = np.arange(25, dtype="u1").reshape(25, 1, 1, 1) * np.ones((1, 3, 3, 3), "u1")
    np.savez(tmp_path / "b.npz", x_train=pixels)
    data = named(
        tmp_path / "b.npz", npz(tmp_path / "a.npz", layout=layout, shape=(3, 8, 3), n_bits=7)
    )
    assert data.undivided and values(data) == [i // 2 for i in range(25)]


def test_all_images_of_arrays_without_splits(tmp_path):
    pixels = np.arange(25, dtype="u1").reshape(25, 1, 1, 1) * np.ones((1, 8, 8, 3), "u1")
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(np.split(pixels, [20])):
        np.save(tmp_path / "parts" / f"x_train-{number}.npy", part)
    np.save(tmp_path / "b.npy", pixels)
    for name in ("parts", "b.npy"):
        data = named(tmp_path / name, npz(tmp_path / "a.npz"))
        assert data.undivided and values(data) == list(range(25))


def test_the_models_own_data_keep_their_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((20, 8, 8, 3), "u1"))
    own = {"name": "npz", "path": str(tmp_path / "a.npz")}
    for name in ("npz", tmp_path / "a.npz"):
        data = named(name, own)
        assert not data.undivided and len(data.split("test")) == 2


@functools.cache
def a_run():
    """A model of 3x8x8 images with 256 levels."""
    section = npz(FOLDER / "named.npz", shape=(8, 8, 3))
    words = [
        *SMALL,
        *sets(
            data__name="npz", data__path=section["path"], train__num_steps=2, train__batch_size=8
        ),
    ]
    quick("train", *words, "--run-dir", "named", cwd=FOLDER).ok()
    return FOLDER / "named"


def evaluate(tmp_path, *words):
    return quick("evaluate", a_run(), *words, cwd=tmp_path)


def test_evaluate_on_other_data(tmp_path):
    pictures(tmp_path / "p", 12)
    found = evaluate(tmp_path, "--data", "p", "--scores", "s.csv", "--json", "r.json").ok()
    assert "on all of p" in found.out
    outcome = json.loads((tmp_path / "r.json").read_text())
    assert (outcome["dataset"], outcome["split"], outcome["num_images"]) == ("p", "all", 12)
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 13
    # The file as such scores as it does in the folder (its noise is that of the first image).
    one = json.loads(evaluate(tmp_path, "--data", "p/0.png", "--json", "-").ok().out)
    assert one["num_images"] == 1
    assert one["bits_per_dim"] == pytest.approx(
        float((tmp_path / "s.csv").read_text().splitlines()[1].split(",")[1])
    )
    # Keys of data still apply.
    reduced = evaluate(tmp_path, "--data", "p", "--set", "data.size=6")
    reduced.failed(2, "(3, 6, 6) with 256 levels cannot be evaluated", "(3, 8, 8)")


def test_the_result_on_other_data_does_not_replace_that_on_the_models_own(tmp_path):
    """Nor that on others of the same name."""
    before = tree(a_run())
    for path in ("b.npz", "c/b.npz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        npz(tmp_path / path, shape=(8, 8, 3), test=5)
        evaluate(tmp_path, "--data", path).ok()
    new = sorted(set(tree(a_run())) - set(before))
    assert len(new) == 2 and all(re.fullmatch(r"evaluate-b-[0-9a-f]{8}-test.json", n) for n in new)
    split = evaluate(tmp_path, "--data", "b.npz", "--split", "validation", "--json", "-").ok()
    assert (
        json.loads(split.out)["num_images"] == 2 and json.loads(split.out)["split"] == "validation"
    )

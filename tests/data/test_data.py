"""From a data set to batches: splits, their fingerprint, the order, streaming and augmentation."""

import contextlib
import functools
import itertools
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch
from catalogue import SMALL, sets
from cli_helpers import FOLDER, quick, tree
from helpers import SHARED, a_config, batch_of, npz, seeded, shared
from PIL import Image

from flowtrain import config as configuration
from flowtrain.data.batches import Batches, ReadAhead, augment
from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet, Split
from flowtrain.errors import UserError

CPU = torch.device("cpu")


def batches(section, batch_size=6, seed=0):
    config = a_config("nice", data=section, seed=seed)
    return Batches(DataSet(config.data), config, batch_size, CPU)


def first(source, count, start=0):
    return [batch_of(source, step)[0] for step in range(start, start + count)]


def data_set(section):
    return DataSet(a_config("nice", data=section).data)


@pytest.fixture
def numbered(tmp_path):
    """20 training images that can be told apart: image i has the value i, and i + 100 on its left
    half.
    """
    pixels = np.broadcast_to(
        np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 8, 8, 1)
    ).copy()
    pixels[:, :, :4] += 100
    np.savez(tmp_path / "numbered.npz", x_train=pixels, x_test=pixels[:4])
    return {"name": "npz", "path": str(tmp_path / "numbered.npz"), "validation": 0}


def ids(x):
    return x.flatten(1).min(dim=1).values.tolist()


# ---------------------------------------------------------------- splits


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


@pytest.mark.parametrize("validation, held", [(0, 0), (5, 5), (0.5, 20), (0.01, 1), (39, 39)])
def test_validation_is_a_count_or_a_fraction(tmp_path, validation, held):
    data = data_set(npz(tmp_path / "a.npz", train=40, validation=validation))
    assert (len(data.split("train")), len(data.split("validation"))) == (40 - held, held)


@pytest.mark.parametrize("validation", [40, 100, 2.5])
def test_impossible_validation(tmp_path, validation):
    with pytest.raises(UserError, match="data.validation"):
        data_set(npz(tmp_path / "a.npz", train=40, validation=validation)).split("train")


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


@pytest.mark.parametrize("n_bits", [1, 4, 5, 8])
def test_n_bits_keeps_the_upper_bits(tmp_path, n_bits):
    section = npz(tmp_path / "a.npz", validation=5, n_bits=n_bits)
    data = data_set(section)
    assert data.levels == 2**n_bits
    with np.load(section["path"]) as arrays:
        expected = arrays["x_test"].transpose(0, 3, 1, 2) // 2 ** (8 - n_bits)
    assert np.array_equal(data.split("test").take(slice(None)), expected)
    for x in first(batches(section), 3):
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


# ---------------------------------------------------------------- the order


def test_every_image_once_an_epoch(numbered):
    # 20 images in batches of 6: batches 3 and 6 straddle two epochs.
    order = [i for x in first(batches(numbered), 10) for i in ids(x)]
    assert len(order) == 60
    epochs = [order[i : i + 20] for i in range(0, 60, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(20))


def test_a_batch_larger_than_the_split(numbered):
    x = first(batches(numbered, batch_size=50), 2)[1]
    assert len(x) == 50
    counts = np.bincount(ids(x), minlength=20)
    assert counts.min() >= 2 and counts.max() <= 3


def test_the_order_is_seeded(numbered):
    assert [ids(x) for x in first(batches(numbered), 5)] == [
        ids(x) for x in first(batches(numbered), 5)
    ]
    assert [ids(x) for x in first(batches(numbered), 5)] != [
        ids(x) for x in first(batches(numbered, seed=1), 5)
    ]


@pytest.mark.parametrize("start", [1, 3, 4, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True, "shift": 2},
        {"max_in_memory": 0, "workers": 0, "shift": 1},
        {"max_in_memory": 0, "workers": 2, "shift": 1},
    ],
)
def test_resumable_from_any_step(numbered, start, options):
    """By new batches, and by those that have gone further, as after a loss that is not finite."""
    section = {**numbered, **options}
    source = batches(section)
    every = first(source, start + 4)
    for again in (batches(section), source):
        for a, b in zip(every[start:], first(again, 4, start), strict=True):
            assert torch.equal(a, b)
        again.close()


def test_the_last_order_is_not_assumed(numbered):
    # One object, asked out of order.
    source = batches(numbered)
    late = source.positions(9).tolist()
    assert source.positions(0).tolist() == batches(numbered).positions(0).tolist()
    assert source.positions(9).tolist() == late


# ---------------------------------------------------------------- in memory, or streamed


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_changes_nothing(tmp_path, workers):
    section = npz(tmp_path / "a.npz", validation=3, shift=1, flip=True, n_bits=6)
    resident = batches(section)
    streamed = batches({**section, "max_in_memory": 0, "workers": workers})
    assert streamed.streams and not resident.streams
    for a, b in zip(first(resident, 8, 2), first(streamed, 8, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_from_a_memory_map(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(23):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), "u1")).save(
            tmp_path / "images" / f"{i}.png"
        )
    section = {"name": "folder", "path": str(tmp_path / "images"), "size": 8, "validation": 4}
    resident = batches(section)
    streamed = batches({**section, "max_in_memory": 0, "workers": workers})
    assert isinstance(streamed.source.pixels, np.memmap) and streamed.streams
    for a, b in zip(first(resident, 6), first(streamed, 6), strict=True):
        assert torch.equal(a, b)


def test_reading_ahead_is_in_order_and_ends_when_closed():
    """However long each takes; and the error of a thread is that of its reader."""
    running = threading.active_count()

    def function(n):
        time.sleep(0.01 * (n % 3 == 0))
        if n == 20:
            raise OSError("the disk is gone")
        return torch.tensor(n)

    with contextlib.closing(ReadAhead(function, 2, 3)) as read:
        assert [int(read(n)) for n in range(2, 20, 2)] == list(range(2, 20, 2))
        assert threading.active_count() == running + 3
        with pytest.raises(OSError, match="the disk is gone"):
            read(20)
    assert threading.active_count() == running


def test_after_a_jump_what_was_read_ahead_is_dropped():
    """A reader may ask for any position, as a run does that goes back to a checkpoint."""
    with contextlib.closing(ReadAhead(torch.tensor, 3, 2)) as read:
        for position in (30, 33, 36, 6, 9, 30, 30, 33):
            assert int(read(position)) == position
        assert read.results.keys() == {36, 39, 42, 45}


def test_what_fits_is_held_in_memory(tmp_path):
    section = npz(tmp_path / "a.npz", train=40, validation=8)  # 32 * 64 bytes
    size = 32 * 64 / 2**30
    assert not batches({**section, "max_in_memory": size}).streams
    assert batches({**section, "max_in_memory": 0.99 * size}).streams


# ---------------------------------------------------------------- augmentation


def test_augmentation_off_changes_nothing():
    x = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(x, False, 0, seeded()), x)


def test_flips():
    x = torch.randint(256, (400, 3, 4, 6), generator=seeded(1), dtype=torch.uint8)
    before = x.clone()
    y = augment(x, True, 0, seeded())
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert (mirrored | (y == x).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250
    assert torch.equal(x, before) and y.dtype == torch.uint8
    assert torch.equal(y, augment(x, True, 0, seeded())) and not torch.equal(
        y, augment(x, True, 0, seeded(2))
    )


def test_shifts():
    x = torch.randint(256, (200, 2, 6, 7), generator=seeded(1), dtype=torch.uint8)
    before = x.clone()
    y = augment(x, False, 2, seeded())
    assert y.shape == x.shape and y.dtype == torch.uint8 and torch.equal(x, before)
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    moves = {}
    for down, right in itertools.product(range(5), repeat=2):
        window = padded[:, :, down : down + 6, right : right + 7]
        for i in (y == window).flatten(1).all(1).nonzero().flatten().tolist():
            moves[i] = (down, right)
    assert len(moves) == 200  # each image is moved as a whole, by no more than 2
    assert len(set(moves.values())) == 25  # in every way there is


@pytest.mark.parametrize(
    "section, flip",
    [
        ({"name": "digits"}, False),
        ({"name": "mnist"}, False),
        ({"name": "cifar10"}, True),
        ({"name": "cifar10", "flip": False}, False),
        ({"name": "digits", "flip": True}, True),
    ],
)
def test_flips_are_for_data_sets_that_have_a_mirror_image(section, flip):
    assert data_set(section).flip is flip


def test_only_training_images_are_augmented(numbered):
    section = {**numbered, "flip": True, "shift": 3, "validation": 4}
    data = data_set(section)
    for name in ("validation", "test"):
        x = data.split(name).take(slice(None))
        assert (x[..., :4] == x[..., :1]).all() and (x[..., 0, 0] >= 100).all()
    x = torch.cat(first(batches(section), 4))
    assert not (x[..., :4] == x[..., :1]).all()
    # The resident copy is not written into.
    source = batches(section)
    before = source.resident.clone()
    first(source, 3)
    assert torch.equal(source.resident, before)


def test_augmentation_differs_from_step_to_step(numbered):
    section = {**numbered, "flip": True, "shift": 2}
    epochs = [torch.cat(first(batches(section, batch_size=20), 1, step)) for step in (0, 1)]
    by_image = [x[torch.tensor(ids(x)).argsort()] for x in epochs]
    assert not torch.equal(*by_image)


# ---------------------------------------------------------------- data that a command line names


def named(name, own, shape=(3, 8, 8)):
    """The data set that a name stands for, beside a model's own."""
    own = a_config("nice", data=own).data
    config = a_config("nice", data=section_named(str(name), own, shape, "--dataset")).data
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
    mnist = section_named("mnist", a_config("nice", data=own).data, (3, 8, 8), "--dataset")
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
    found = evaluate(tmp_path, "--dataset", "p", "--scores", "s.csv", "--json", "r.json").ok()
    assert "on all of p" in found.out
    outcome = json.loads((tmp_path / "r.json").read_text())
    assert (outcome["dataset"], outcome["split"], outcome["num_images"]) == ("p", "all", 12)
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 13
    # The file as such scores as it does in the folder (its noise is that of the first image).
    one = json.loads(evaluate(tmp_path, "--dataset", "p/0.png", "--json", "-").ok().out)
    assert one["num_images"] == 1
    assert one["bits_per_dim"] == pytest.approx(
        float((tmp_path / "s.csv").read_text().splitlines()[1].split(",")[1])
    )
    # Keys of data still apply.
    reduced = evaluate(tmp_path, "--dataset", "p", "--set", "data.size=6")
    reduced.failed(2, "(3, 6, 6) with 256 levels cannot be evaluated", "(3, 8, 8)")


def test_the_result_on_other_data_does_not_replace_that_on_the_models_own(tmp_path):
    section = npz(tmp_path / "b.npz", shape=(8, 8, 3), test=5)
    before = tree(a_run())
    evaluate(tmp_path, "--dataset", section["path"]).ok()
    assert set(tree(a_run())) - set(before) == {"evaluate-b-test.json"}
    split = evaluate(tmp_path, "--dataset", "b.npz", "--split", "validation", "--json", "-").ok()
    assert (
        json.loads(split.out)["num_images"] == 2 and json.loads(split.out)["split"] == "validation"
    )


@pytest.mark.parametrize(
    "words, fragments",
    [
        (
            ["--dataset", "mnits"],
            ["--dataset mnits: neither a data set", "mnist", "folder", ".png", ".npz"],
        ),
        (["--dataset", "npz.txt"], ["--dataset npz.txt: neither"]),
        (["--dataset", "no.npz"], ["--dataset no.npz: there is no such file"]),
        (["--dataset", "no.png"], ["--dataset no.png: there is no such file"]),
        (
            ["--dataset", "digits"],
            ["(1, 8, 8) with 17 levels cannot be evaluated", "(3, 8, 8) with 256 levels"],
        ),
        (["--dataset", "empty"], ["there is no image in", "empty"]),
        (["--dataset", "bad.png"], ["bad.png cannot be read as an image"]),
        (["--dataset", "bad.npz"], ["bad.npz is not an .npz file"]),
        (["--dataset", "p", "--split", "test"], ["--split test: p has no splits"]),
        (["--split", "all"], ["--split all: expected test, validation or train"]),
        (
            ["--dataset", "digits", "--set", "data.size=3"],
            ["--dataset digits: data.size: unknown key"],
        ),
    ],
)
def test_data_that_cannot_be_evaluated(tmp_path, words, fragments):
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "p", 2)
    for name in ("npz.txt", "bad.png", "bad.npz"):
        (tmp_path / name).write_text("no")
    evaluate(tmp_path, *words).failed(2, *fragments)


# ---------------------------------------------------------------- real images


@shared
def test_real_mnist():
    section = {"name": "mnist", "root": str(SHARED), "validation": 5000}
    source = batches(section, batch_size=32)
    assert len(source.source) == 55000 and source.resident.shape == (55000, 1, 28, 28)
    (x,) = first(source, 1)
    assert 20 < x.float().mean() < 50 and x.max() == 255


@shared
def test_real_cifar10():
    data = data_set({"name": "npz", "path": str(SHARED / "cifar10.npz"), "n_bits": 5})
    assert (data.shape, data.levels) == ((3, 32, 32), 32)
    x = data.split("test").take(slice(0, 500))
    assert x.shape == (500, 3, 32, 32) and x.max() == 31 and 12 < x.float().mean() < 18


def test_digits_are_the_default():
    data = data_set({})
    assert (data.shape, data.levels) == ((1, 8, 8), 17)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [1455, 162, 180]

"""A user's own folder of images, its list, and its cache."""

import errno
import io
import os
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
from dataset_helpers import check, corrupt, cut, encoded, noise
from PIL import Image

from flowtrain.datasets import base, cache, folder
from flowtrain.errors import RunError, UserError
from flowtrain.system import files


def draw(path, size=(12, 12), mode="RGB", seed=0, **options):
    """Saves an image of one colour, which every resizing keeps: the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, seed).convert(mode).save(path, **options)


def grow(root, count=20):
    for i in range(count):
        draw(root / f"{i:03}.png", seed=i)
    return root


def images_of(path, part="train", size=4, **options):
    return folder.build(None, part, path=path, size=size, **options)


def settle(tree):
    """As if the last change of every folder and file were of long ago."""
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (10**9, 10**9))


def values(images):
    return check(images)[:, 0, 0, 0].tolist()


def caches():
    return list((cache.place() / "folder").glob("*"))


@pytest.fixture
def tree(tmp_path):
    return grow(tmp_path / "tree")


@pytest.fixture
def decoded(monkeypatch):
    """Counts the decoded images."""
    monkeypatch.setattr(base, "decode", mock.Mock(wraps=base.decode))
    return base.decode


def test_mixed_images_in_any_tree(tmp_path):
    draw(tmp_path / "b" / "deep" / "one.PNG", (20, 30), "L", 10)
    (tmp_path / "b" / "round").symlink_to(tmp_path / "b")  # followed once
    draw(tmp_path / "a.JPeG", (64, 20), "RGB", 20, quality=100)
    draw(tmp_path / "c.bmp", (8, 8), "RGB", 30)
    draw(tmp_path / "d.webp", (9, 8), "RGB", 40, lossless=True)
    draw(tmp_path / "e.png", (8, 8), "P", 51)
    draw(tmp_path / "f.png", (8, 8), "RGBA", 60)
    draw(tmp_path / "Z.png", (3, 3), "LA", 70)
    frames = [Image.new("L", (8, 8), seed) for seed in (80, 90)]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    draw(tmp_path / "h.tif", (8, 8), "RGB", 100)
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / ".thumbs" / "x.png")
    (tmp_path / "notes.txt").write_text("not an image")
    draw(tmp_path / "test" / "t.png", seed=99)
    for channels in (3, 1):
        images = images_of(tmp_path, size=8, channels=channels)
        assert images.shape == (channels, 8, 8) and images.num_bins == 256 and not images.flip
        # by relative path, as bytes sort: Z, a, b/deep/one, c, d, e, f, g, h
        assert np.allclose(values(images), [70, 20, 10, 30, 40, 51, 60, 80, 100], atol=1)


def test_another_size_under_the_policy_exact(tmp_path):
    draw(tmp_path / "train" / "a.png", (36, 12))
    draw(tmp_path / "test" / "t.png")
    with pytest.raises(UserError, match=r"exact, but .*train/a.png: the image is 36x12 .* 12x12"):
        images_of(tmp_path, size=12, resize="exact").read()


def test_a_stable_tenth_is_held_out(tmp_path):
    tree = grow(tmp_path / "tree", 30)
    test, train = values(images_of(tree, "test")), values(images_of(tree))
    assert len(test) == 3 and sorted(test + train) == list(range(30))
    assert values(images_of(tree, "test", seed=1)) != test
    copy = tmp_path / "copy"  # another machine: another place and, in the end, other times
    shutil.copytree(tree, copy)
    assert values(images_of(copy, "test")) == test and len(caches()) == 2
    settle(copy)
    others = {"part": "train"}, {"size": 5}, {"seed": 1}
    keys = {images_of(tree, **{"part": "test", **other}).key for other in ({}, *others)}
    assert len(keys) == 4 and images_of(copy, "test").key == images_of(tree, "test").key
    (tree / "000.png").write_bytes(b"")  # an unreadable file keeps its place in the split
    (tree / f"{test[0]:03}.png").write_bytes(b"")
    images = images_of(tree, "test")
    assert values(images) == test[1:]
    names = images.names()
    assert [names[row] for row in images.rows()] == [f"{value:03}.png" for value in test[1:]]


def test_equal_images_are_on_one_side(tree):
    """Also those of different files: every image is there as PNG, BMP and in another size."""
    for i in range(20):
        draw(tree / "more" / f"{i}.bmp", seed=i)
        draw(tree / "more" / f"{i}.png", (30, 30), seed=i)
    (tree / "003.png").write_bytes(b"")
    test, train = values(images_of(tree, "test")), values(images_of(tree))
    assert len(test + train) == 59 and test and not set(test) & set(train)


@pytest.mark.parametrize(
    "folders, train, test",
    [
        (("train", "test", ""), {"train"}, {"test"}),
        (("test", "", "val"), {"", "val"}, {"test"}),
        (("test", "", "val/test"), {"", "val/test"}, {"test"}),
        (("train", "", "val"), {"train"}, {"train"}),
        (("", "val", "deep/test"), {"", "val", "deep/test"}, {"", "val", "deep/test"}),
    ],
)
def test_folders_of_train_and_test(tmp_path, folders, train, test):
    for n, name in enumerate(folders):
        for i in range(5):
            draw(tmp_path / name / f"{i}.png", seed=10 * n + i)
    found = {split: values(images_of(tmp_path, split)) for split in ("train", "test")}
    parts = {s: {folders[v // 10] for v in vs} for s, vs in found.items()}
    assert parts["train"] == train and parts["test"] <= test
    assert not set(found["train"]) & set(found["test"])
    assert len(found["train"] + found["test"]) == 5 * len(train | test)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, r"data.path: .*tree is no folder"),
        (lambda p: p.write_text(""), r"data.path: .*tree is not a folder"),
        (lambda p: p.mkdir(), r"data.path: there is no image in .*tree \(looked for .png"),
        (lambda p: (p / "train").mkdir(parents=True), r"no image in .*tree/train"),
        (lambda p: draw(p / "test" / "a.png"), r"no image in .*tree \("),
        (lambda p: draw(p / "a.png"), r"data.path: .*one image, which cannot be split"),
    ],
)
def test_what_is_refused(tmp_path, make, message):
    make(tmp_path / "tree")
    with pytest.raises(UserError, match=message):
        images_of(tmp_path / "tree")


@pytest.mark.parametrize("resize", ["crop", "stretch", "exact"])
def test_images_that_are_enlarged_are_counted(resize, tmp_path, caplog):
    """In one warning each time, also if the cache is there. They are blurred."""
    sizes = [(8, 8)] * 3 if resize == "exact" else [(7, 20), (20, 7), (8, 20)]
    for index, size in enumerate(sizes):
        draw(tmp_path / f"{index}.png", size, seed=index)
    for _ in range(2):
        caplog.clear()
        images_of(tmp_path, size=8, resize=resize).read()
        message = f"data.size: 2 of 3 images in {tmp_path} have a side of less than 8 pixels and"
        warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
        assert warnings == [f"{message} are enlarged"] * (resize != "exact")


@pytest.mark.parametrize("resize", ["crop", "exact"])
def test_unreadable_files_are_named_and_left_out(tmp_path, monkeypatch, caplog, decoded, resize):
    """A pipe or a device is not waited for."""
    train = grow(tmp_path / "train")
    draw(tmp_path / "test" / "t.png")
    (train / "003.png").write_bytes(b"")
    (train / "005.png").write_text("not an image")
    (train / "007.jpg").write_bytes(encoded(noise(3, 12, 12), "JPEG")[:-300])
    (train / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(train / "pipe.png")
    (train / "zero\x1b.png").symlink_to("/dev/zero")
    for start in ("first", "second"):
        caplog.clear()
        images = images_of(tmp_path, size=12, resize=resize)
        assert values(images) == [i for i in range(20) if i not in (3, 5)]
        assert f"6 of 24 train images in {tmp_path}" in caplog.text, start
        for name in ("003.png", "005.png", "007.jpg", "gone.png", "pipe.png", "zero?.png"):
            assert f"train/{name}: " in caplog.text
        assert caplog.text.count("not a regular file") == 2 and "t.png" not in caplog.text
    assert decoded.call_count == 24  # the second start remembered them
    monkeypatch.setattr(cache, "LISTED", 4)
    caplog.clear()
    images.read()
    assert caplog.text.count("  train/") == 4 and "  and 2 more, see " in caplog.text


def test_only_unreadable_images(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no")
    with pytest.raises(UserError, match=r"no image in .* can be read \(\d.png: cannot identify"):
        images_of(tmp_path).read()
    assert not caches()


def test_images_are_decoded_once(tree, decoded):
    before = sorted(tree.rglob("*"))

    def start(**options):
        images = images_of(tree, **options)
        decoded.reset_mock()
        return values(images), decoded.call_count

    first, count = start()
    assert (len(first), count) == (18, 20) and start() == (first, 0)
    assert sorted(tree.rglob("*")) == before  # nothing is written into the user's tree
    for options in ({"size": 5}, {"channels": 1}, {"resize": "stretch"}):
        assert start(**options)[1] == 20
    changed = tree / f"{first[0]:03}.png"
    for seed, size in ((200, 12), (201, 40)):  # a file's time counts, and its size
        draw(changed, (size, size), seed=seed)
        os.utime(changed, (1, 1))
        assert start() == ([seed, *first[1:]], 20)
    draw(tree / "new.png", seed=100)
    assert start()[1] == 21, "a new file counts"


@pytest.mark.parametrize(
    "function, error, expected",
    [
        ((os, "fsync"), KeyboardInterrupt(), KeyboardInterrupt),
        ((os, "fsync"), OSError(errno.ENOSPC, "No space left on device"), RunError),
        ((base, "decode"), OSError(errno.EIO, "Input/output error"), RunError),
    ],
)
def test_an_interruption_or_a_failing_disk_leaves_nothing(
    tree, monkeypatch, function, error, expected
):
    monkeypatch.setattr(cache, "CHUNK", 4)
    images = images_of(tree)
    with monkeypatch.context() as patch:
        patch.setattr(*function, mock.Mock(side_effect=error))
        with pytest.raises(expected, match=getattr(error, "strerror", None)):
            images.read()
    assert not caches()
    assert len(values(images)) == 18 and len(caches()) == 1


def test_left_overs_of_a_kill_and_two_processes_at_once(tree, monkeypatch):
    other, decode, home = images_of(tree), base.decode, cache.place() / "folder"
    (home / ".killed.0123abcd.tmp" / "images").mkdir(parents=True)

    def late(*args):  # the other process is faster
        monkeypatch.setattr(base, "decode", decode)
        other.read()
        return decode(*args)

    monkeypatch.setattr(cache, "THREADS", 1)
    monkeypatch.setattr(base, "decode", late)
    with files.new_folder(home / "living") as living:
        assert values(images_of(tree)) == values(other) and base.decode is decode
        assert len(caches()) == 2 and living in caches()


def test_the_place_of_the_cache(tmp_path, tree, monkeypatch):
    images = images_of(tree)
    for wrong in (str(tree / "000.png"), "~no-such-user/x"):
        monkeypatch.setenv("FLOWTRAIN_CACHE", wrong)
        with pytest.raises(UserError, match="FLOWTRAIN_CACHE"):
            images.read()
    monkeypatch.delenv("FLOWTRAIN_CACHE")
    for variable, place in (("XDG_CACHE_HOME", "flowtrain"), ("HOME", ".cache/flowtrain")):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        images.read()
        assert list((tmp_path / variable / place).rglob("images.npy"))
        monkeypatch.delenv(variable)


def test_progress(tree, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    images_of(tree).read()
    assert sys.stderr.getvalue() == ""
    sys.stderr.isatty = lambda: True
    images_of(tree, size=5).read()
    assert "decoding" in sys.stderr.getvalue()


def lists():
    return list((cache.place() / "lists").glob("*"))


def listed(tree):
    return [file.name for file in folder.files_of(tree, "")]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A tree with a folder in it, which counts as large."""
    monkeypatch.setattr(folder, "LARGE", 0)
    grow(tmp_path / "large" / "inner", 5)
    return grow(tmp_path / "large", 5)


@pytest.fixture
def walks(monkeypatch):
    """Counts the listings of a tree."""
    monkeypatch.setattr(folder, "_listed", mock.Mock(wraps=folder._listed))
    return folder._listed


def test_a_large_tree_is_listed_once(large, walks, monkeypatch):
    """But not one that has just changed, as it could change again without another time."""
    assert listed(large) == listed(large) and walks.call_count == 2 and not lists()
    settle(large)
    walks.reset_mock()
    first = listed(large)
    assert len(first) == 10 and first == listed(large) and walks.call_count == 1
    lists()[0].unlink()
    monkeypatch.setattr(folder, "LARGE", 11)
    assert listed(large) == first and not lists()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: draw(t / "inner" / "new.png"),
        lambda t: (t / "inner" / "002.png").unlink(),
        lambda t: (t / "inner" / "002.png").rename(t / "inner" / "x.png"),
        lambda t: shutil.rmtree(t / "inner"),
        lambda t: draw(t / "another" / "new.png"),
        lambda t: draw(t / "inner" / "002.png", (30, 30)),  # the folder keeps its time
        lambda t: corrupt(lists()[0]),
        lambda t: cut(lists()[0]),
    ],
)
def test_a_changed_tree_is_listed_again(large, walks, change):
    settle(large)
    listed(large)
    [remembered] = lists()
    change(large)
    walks.reset_mock()
    found = folder.files_of(large, "")
    assert walks.call_count == 1
    remembered.unlink(missing_ok=True)
    assert found == folder.files_of(large, "")


def test_a_tree_too_deep_for_this_python(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "walk", mock.Mock(side_effect=RecursionError))
    with pytest.raises(UserError, match="data.path: .* has folders too deep to list"):
        images_of(tmp_path)
